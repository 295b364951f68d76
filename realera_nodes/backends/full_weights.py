"""Any weights of a UNet in training: what is learned is a difference, added for each call. The network itself is only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.concepts import Concept
from ..core.errors import ErasureError
from ..core.esd import EsdConfig, esd_prompts, train_esd
from ..core.spans import TextStates
from ..core.training import TrainState

#: types of weights that autograd takes
TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Call(nn.Module):
    """A prediction as a module's forward, so that ``functional_call`` reaches the network under it."""

    def __init__(self, network: nn.Module, predict: Callable[[Tensor, Tensor, TextStates], Tensor]):
        super().__init__()
        self.network, self.predict = network, predict

    def forward(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        return self.predict(z, t, text)


class FullWeights:
    """A ``FullStudent`` on a UNet: weight + difference inside ``tuned``, the weights alone outside of it.

    Differences are float32 whatever the UNet's type, so that no small step is lost; their sum with the weights is rounded to
    that type for the call. Memory beside the UNet: for each trained weight its difference, gradient, Adam's two moments, and
    the sum.

    Args:
        backend: whose ``predict_noise`` calls the network
        network: the UNet
        paths: name (diffusers') -> path in the network of each parameter that trains

    Raises:
        ErasureError: a parameter of a type without gradients.
    """

    def __init__(self, backend: Any, network: nn.Module, paths: Mapping[str, str]):
        self.backend = backend
        self.latent_shape: tuple[int, ...] = tuple(backend.noise([0]).shape[1:])
        self.paths = {name: paths[name] for name in sorted(paths)}
        parameters = dict(network.named_parameters())
        self.base = {name: parameters[path] for name, path in self.paths.items()}
        for name, p in self.base.items():
            if p.dtype not in TRAINABLE or type(p) is not nn.Parameter:
                held = p.dtype if type(p) is nn.Parameter else "whole numbers with scales"
                raise ErasureError(f"{name} is held as {held}, which cannot be trained: load it as float16 or float32.")
        half = any(p.dtype == torch.float16 for p in self.base.values())
        self.loss_scale = 2.0**13 if half else 1.0
        self._deltas = {
            name: nn.Parameter(torch.zeros(p.shape, dtype=torch.float32, device=p.device)) for name, p in self.base.items()
        }
        self._call = _Call(network, backend.predict_noise)
        self._sum: dict[str, Tensor] | None = None

    def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """DDIM's timesteps (S,), noisiest first, and alpha_bar (S,) at each."""
        return self.backend.schedule(steps)

    def predict_noise(self, z: Tensor, t: Tensor, text: TextStates) -> Tensor:
        if self._sum is None:
            return self.backend.predict_noise(z, t, text)
        return functional_call(self._call, self._sum, (z, t, text))

    @contextmanager
    def tuned(self) -> Iterator[None]:
        """The weights with their differences, summed once on entering: a step of the optimiser shows after the next entry."""
        before = self._sum
        parts = ((self.paths[name], p, self._deltas[name]) for name, p in self.base.items())
        self._sum = {f"network.{path}": (p.float() + delta).to(p.dtype) for path, p, delta in parts}
        try:
            yield
        finally:
            self._sum = before

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The UNet as it is."""
        before, self._sum = self._sum, None
        try:
            yield
        finally:
            self._sum = before

    def student(self) -> AbstractContextManager[None]:
        """The weights in training, by the name that adapters' students have for them."""
        return self.tuned()

    def parameters(self) -> list[nn.Parameter]:
        return list(self._deltas.values())

    def deltas(self) -> dict[str, Tensor]:
        """What was learned, by parameter name (``.weight`` or ``.bias`` at the end): float32 on the CPU."""
        return {name: delta.detach().cpu().clone() for name, delta in self._deltas.items()}


@contextmanager
def full_weights(backend: Any, network: nn.Module, paths: Mapping[str, str]) -> Iterator[FullWeights]:
    """A student with the parameters at ``paths``. On leaving, the network is as it was, its gradient flags too.

    Raises:
        ErasureError: no parameter is wanted, or one that cannot be trained.
    """
    if not paths:
        raise ErasureError("no weight of the model was chosen for training: it has no layers of that kind; choose other ones.")
    flags = [(p, p.requires_grad) for p in network.parameters()]
    network.requires_grad_(False)  # else backward would fill the gradients of all weights that do not train
    try:
        yield FullWeights(backend, network, paths)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def edited_parameters(network: nn.Module, deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the network computes with parameter + delta. The parameters themselves are put back, whatever happens.

    Raises:
        ErasureError: a name or a shape that the network does not have.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, delta in deltas.items():
            owner, leaf = _owner(network, name)
            p = owner._parameters[leaf]
            assert p is not None
            if p.shape != delta.shape:
                layer = name.removesuffix(".weight")
                raise ErasureError(f"the edit of {layer} has shape {tuple(delta.shape)} instead of {tuple(p.shape)}: "
                                   "it was made for another model.")  # fmt: skip
            kept.append((owner, leaf, p))
            new = (p.detach().float() + delta.to(p.device).float()).to(p.dtype)
            owner._parameters[leaf] = nn.Parameter(new, requires_grad=False)
        yield
    finally:
        for owner, leaf, p in reversed(kept):
            owner._parameters[leaf] = p


def _owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = network.get_submodule(path)
    except AttributeError:
        owner = None
    if owner is None or owner._parameters.get(leaf) is None:
        raise ErasureError(f"the model has no parameter {name}: the edit was made for another model.")
    return owner, leaf


def esd(
    backend: Any, concepts: Sequence[Concept], config: EsdConfig, on_step: Callable[[TrainState], None] | None = None,
    state: TrainState | None = None, on_denoise: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], TrainState]:  # fmt: skip
    """ESD on a backend: differences by parameter name, and the state that a stopped run goes on from (see ``train_esd``).

    Raises:
        ErasureError: contradictory concepts, a loss that is not finite, or a model that ESD cannot train.
    """
    prompts = esd_prompts(concepts, config)
    texts, empty = backend.encode(prompts), backend.encode([""])
    with backend.training_weights(config.trains) as student:
        trained = train_esd(student, texts, empty, config, on_step, state, on_denoise)
        return student.deltas(), trained

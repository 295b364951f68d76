"""A job's progress that is watched, and stopped on the way."""

from __future__ import annotations


class Stopped(Exception):
    """What a user's cancel is to a job."""


class Watched:
    """Notes the steps of one stage; at ``stop`` it raises Stopped."""

    def __init__(self, stage: str, stop: int = 0):
        self.stage, self.stop = stage, stop
        self.visited: list[int] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == self.stage:
            self.visited.append(done)
            if done == self.stop:
                raise Stopped

/** RealEra in ComfyUI's page: results drawn inside the nodes that made them. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { html } from "./elements.js";
import { lossCurve } from "./loss.js";
import { neighborMap } from "./map.js";
import { addPanel } from "./panel.js";
import { reportTable } from "./report.js";
import { textBlock } from "./text.js";

const VIEWS = {
  RealEra_MineNeighbors: [[neighborMap], "Queue the graph to see what lies around the concept in this model."],
  RealEra_ClosedForm: [[textBlock], "Queue the graph to read what the edit moves."],
  RealEra_TrainLora: [[lossCurve], "Queue the graph to follow the loss."],
  RealEra_Uce: [[textBlock], "Queue the graph to read what the edit moves."],
  RealEra_TrainEsd: [[lossCurve, textBlock], "Queue the graph to follow the loss."],
  RealEra_Erase: [[lossCurve, textBlock], "Queue the graph to follow the loss and read what the erasure moves."],
  RealEra_Report: [[reportTable], "Queue the graph to compare the model before and after."],
};

/** node -> its panel, for nodes in the page */
const panels = new Map();

const root = () => app.rootGraph ?? app.graph;

/** How the page's store of results calls a node: by its id, within a subgraph after the subgraph's id. */
function locator(node) {
  const within = node.graph && node.graph !== root() ? `${node.graph.id}:` : "";
  return `${within}${node.id}`;
}

/** The node that the server calls by ids of nested subgraph nodes and its own, as in "12:5". */
function byExecution(id) {
  const [last, ...path] = String(id).split(":").reverse();
  const graph = path.reverse().reduce((g, part) => g?.getNodeById(Number(part))?.subgraph, root());
  return graph?.getNodeById(Number(last));
}

/** Older frontends leave the last stage of the progress in a node when a run has ended. */
function forgetStage(node) {
  const i = node.widgets?.findIndex((w) => w.name === "$$node-text-preview") ?? -1;
  if (i < 0) return;
  node.widgets[i].onRemove?.();
  node.widgets.splice(i, 1);
  node.setDirtyCanvas?.(true, true);
}

function prepare(node) {
  const kind = VIEWS[node.comfyClass];
  if (!kind) return;
  const [makers, waiting] = kind;
  const panel = addPanel(node, makers.map((make) => make()), waiting, () => app.canvas);
  panels.set(node, panel);
  if (node.comfyClass === "RealEra_MineNeighbors") {
    // the map's picture, which the node also returns, would be there a second time
    node.onDrawBackground = () => {};
    node.hideOutputImages = true;
  }
  const { onExecuted, onRemoved } = node;
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    panel.show(output);
  };
  node.onRemoved = function () {
    onRemoved?.apply(this, arguments);
    panels.delete(node);
  };
}

app.registerExtension({
  name: "RealEra",
  init() {
    document.head.append(html("link", { rel: "stylesheet", href: new URL("./realera.css", import.meta.url).href }));
  },
  setup() {
    api.addEventListener("realera.loss", ({ detail }) => panels.get(byExecution(detail.node))?.tell("live", detail));
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(end, () => {
        panels.forEach((panel) => panel.tell("stop"));
        setTimeout(() => [...panels.keys()].forEach(forgetStage), 500); // newer ones have done it by then
      });
    }
  },
  /** A graph was loaded over the last one, as by undo: what the page has kept of its results. */
  loadedGraphNode(node) {
    const output = app.nodeOutputs?.[locator(node)];
    if (output) panels.get(node)?.show(output);
  },
  nodeCreated: prepare,
  /** Results that the page has kept: another tab was opened, or an entry of the queue. */
  onNodeOutputsUpdated(outputs) {
    for (const [node, panel] of panels) panel.show(outputs?.[locator(node)]);
  },
});

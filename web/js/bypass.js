// Sends a bypassed node of this pack with a mark, instead of without the node: its output has nothing to stand for it, and the graph would
// not run. The node then does nothing (nodes/host/off.py).

import { app } from "../../../scripts/app.js";
import { findNode, rootGraph } from "./graph.js";

const OFF = "off"; // in nodes/host/off.py
const TYPES = new Set(["IDAdapterApply", "IDAdapterMixFeatures", "IDAdapterPersonalize", "IDAdapterPrompt", "IDAdapterRescale"]);
const ALWAYS = 0;
const BYPASSED = 4;

const graphToPrompt = app.graphToPrompt;
app.graphToPrompt = async function (...parameters) {
  const off = allNodes().filter((node) => TYPES.has(node.type) && node.mode === BYPASSED);
  for (const node of off) node.mode = ALWAYS;
  try {
    const prompt = await graphToPrompt.apply(this, parameters);
    for (const [id, { inputs }] of Object.entries(prompt.output ?? {})) {
      if (off.includes(findNode(id))) inputs[OFF] = true;
    }
    for (const saved of savedNodes(prompt.workflow)) {
      if (off.some((node) => node.type === saved.type && String(node.id) === String(saved.id))) saved.mode = BYPASSED;
    }
    return prompt;
  } finally {
    for (const node of off) node.mode = BYPASSED;
  }
};

function allNodes() {
  const root = rootGraph();
  return [root, ...(root.subgraphs?.values() ?? [])].flatMap((graph) => graph.nodes);
}

function savedNodes(workflow) {
  return [workflow, ...(workflow?.definitions?.subgraphs ?? [])].flatMap((graph) => graph?.nodes ?? []);
}

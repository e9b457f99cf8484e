// The nodes of this pack, and where a running prompt's nodes are on the canvas.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const folder = decodeURIComponent(new URL(import.meta.url).pathname.split("/extensions/")[1].split("/")[0]);
const displayNames = new Map(); // by node type
const workflowOfPrompt = new Map(); // by prompt id, as long as the page is open
const refusals = []; // called with the node errors of a prompt that was not, or not wholly, accepted
const openings = []; // called when another workflow, or another state of it, is on the canvas

app.registerExtension({
  name: "IDAdapter.Graph",
  beforeRegisterNodeDef(_, definition) {
    if (definition.python_module === `custom_nodes.${folder}`) {
      displayNames.set(definition.name, definition.display_name);
    }
  },
});

// There is no event that tells of a prompt's id or of its errors, so the call that queues it is observed.
const queuePrompt = api.queuePrompt;
api.queuePrompt = async function (...parameters) {
  const workflow = openWorkflow();
  try {
    const answer = await queuePrompt.apply(this, parameters);
    workflowOfPrompt.set(answer?.prompt_id, workflow);
    tellRefusals(answer?.node_errors);
    return answer;
  } catch (error) {
    tellRefusals(error.response?.node_errors);
    throw error;
  }
};

// The event that tells of a new graph comes before its workflow is the open one.
const loadGraphData = app.loadGraphData;
app.loadGraphData = async function (...parameters) {
  const answer = await loadGraphData.apply(this, parameters);
  for (const tell of openings) tell();
  return answer;
};

function tellRefusals(nodeErrors) {
  for (const tell of refusals) tell(nodeErrors ?? {});
}

/** Have `tell` called with the validation errors, by execution id, of every prompt that this page queues. */
export function onQueued(tell) {
  refusals.push(tell);
}

/** Have `tell` called whenever the canvas has got new nodes: another workflow, a tab that is shown again, an undo. */
export function onOpened(tell) {
  openings.push(tell);
}

export function isOurs(type) {
  return displayNames.has(type);
}

export function rootGraph() {
  return app.rootGraph ?? app.graph;
}

/** A key of the workflow that is open now: each tab has a path of its own, also before it is saved. */
export function openWorkflow() {
  return app.extensionManager?.workflow?.activeWorkflow?.path ?? "";
}

/** The key of the workflow that a prompt came from: the open one where that is not known. */
export function workflowOf(promptId) {
  return workflowOfPrompt.get(promptId) ?? openWorkflow();
}

/** The node with an execution id of the open workflow: "12", or "12:3" for node 3 inside the subgraph node 12. What a node expands to
 * while it runs, "12.0.0.faces", is that node. */
export function findNode(executionId) {
  let graph = rootGraph();
  let node;
  for (const id of String(executionId).split(".")[0].split(":")) {
    node = graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node;
}

/** What the user calls a node: its title, or its type's name where the open workflow has no such node. */
export function titleOf(executionId, type) {
  const node = findNode(executionId);
  return (node?.type === type && node.title) || displayNames.get(type) || type;
}

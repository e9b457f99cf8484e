// Shows on each node of this pack what it reports of its work, and what turned out about it later.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { findNode, isOurs, openWorkflow, rootGraph, workflowOf } from "./graph.js";

const EVENT = "idadapter.messages";
const REPORT_KEY = "idadapter";
const TOPICS = ["graph", "run", "report"]; // in the order in which they are shown
const WIDGET = "idadapter_messages";
const MARGIN = 6; // pixels around the text
const TALLEST = 320; // pixels of the text; the rest is scrolled to

const workflows = new Map(); // workflow -> execution id -> topic -> messages

const style = document.createElement("style");
style.textContent = `
.idadapter-messages { overflow-y: auto; max-height: ${TALLEST}px; font-size: 11px; line-height: 1.35; cursor: default; }
.idadapter-messages p { margin: 0 0 3px; padding: 2px 6px; overflow-wrap: anywhere; white-space: pre-wrap; user-select: text;
  border-left: 3px solid transparent; border-radius: 3px; color: var(--input-text, #ddd); }
.idadapter-messages p.warning { border-left-color: #f5a623; background: rgba(245, 166, 35, 0.18); color: var(--fg-color, #fff); }
.idadapter-messages p.warning::before { content: "\\26A0\\FE0E\\00A0"; color: #f5a623; }
`;
document.head.append(style);

function keep(workflow, id, topic, messages) {
  if (!workflows.has(workflow)) workflows.set(workflow, new Map());
  const nodes = workflows.get(workflow);
  nodes.set(id, { ...nodes.get(id), [topic]: messages });
  if (workflow === openWorkflow()) draw(findNode(id));
}

/** All that is to be said on a node. One inside a subgraph that is used twice has two execution ids. */
function messagesOn(node) {
  const found = new Map();
  for (const [id, topics] of workflows.get(openWorkflow()) ?? []) {
    if (findNode(id) !== node) continue;
    for (const topic of TOPICS) {
      for (const message of topics[topic] ?? []) found.set(`${message.level} ${message.text}`, message);
    }
  }
  return [...found.values()];
}

function draw(node) {
  if (!node || !isOurs(node.type)) return;
  const messages = messagesOn(node);
  let widget = node.widgets?.find((candidate) => candidate.name === WIDGET);
  if (messages.length === 0) {
    if (widget) removeWidget(node, widget);
    return;
  }
  widget ??= addWidget(node);
  widget.element.firstChild.replaceChildren(...messages.map(paragraph));
}

function paragraph({ level, text }) {
  const element = document.createElement("p");
  element.className = level;
  element.textContent = text;
  return element;
}

function addWidget(node) {
  const element = document.createElement("div");
  element.className = "idadapter-messages";
  const text = element.appendChild(document.createElement("div"));
  let height = 0; // of the widget, once the browser has laid out the text
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false, // not sent with the prompt
    margin: MARGIN,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false; // not saved with the workflow
  const setHeight = (wanted) => {
    const grown = wanted - height;
    height = wanted;
    resize(node, grown);
  };
  const observer = new ResizeObserver(() => {
    // No height: the node is collapsed or out of sight.
    if (text.offsetHeight) setHeight(Math.min(text.offsetHeight, TALLEST) + 2 * MARGIN);
  });
  observer.observe(text);
  widget.release = () => {
    observer.disconnect();
    setHeight(0);
  };
  return widget;
}

function removeWidget(node, widget) {
  widget.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  widget.release();
}

/** Make room for a text that needs `grown` more pixels. Nodes 2.0 measures its nodes by itself. */
function resize(node, grown) {
  if (grown === 0) return;
  if (!window.LiteGraph?.vueNodesMode) {
    const [width, height] = node.size;
    node.setSize([width, Math.max(node.computeSize()[1], height + grown)]);
  }
  rootGraph().setDirtyCanvas(true, true);
}

function drawAll() {
  for (const id of workflows.get(openWorkflow())?.keys() ?? []) draw(findNode(id));
}

api.addEventListener(EVENT, ({ detail }) => keep(workflowOf(detail.prompt_id), String(detail.node), detail.topic, detail.messages));
api.addEventListener("executed", ({ detail }) => {
  const report = detail.output?.[REPORT_KEY];
  if (report) keep(workflowOf(detail.prompt_id), String(detail.display_node ?? detail.node), "report", report);
});

app.registerExtension({
  name: "IDAdapter.Messages",
  // A workflow that is opened again, or put back by undo, has new nodes. It becomes the open one only after this.
  afterConfigureGraph: () => void setTimeout(drawAll),
  onNodeOutputsUpdated: drawAll,
});

// Shows on each node of this pack what it reports of its work, and what turned out about it later.

import { api } from "../../../scripts/api.js";
import { findNode, isOurs, onOpened, openWorkflow, rootGraph, workflowOf } from "./graph.js";

const EVENT = "idadapter.messages";
const REPORT_KEY = "idadapter";
const TOPICS = ["graph", "run", "result", "report"]; // in the order in which they are shown
const WIDGET = "idadapter_messages";
const MARGIN = 6; // pixels around the text
const TALLEST = 320; // pixels of the text; the rest is scrolled to
const ROW_GAP = 4; // pixels between the widgets of a node in Nodes 2.0

const workflows = new Map(); // workflow -> execution id -> topic -> messages

const style = document.createElement("style");
style.textContent = `
.idadapter-messages { overflow-y: auto; max-height: ${TALLEST}px; font-size: 11px; line-height: 1.35; cursor: default; }
.idadapter-messages > div { display: flow-root; }
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
    widget?.release();
    return;
  }
  widget ??= addWidget(node);
  widget.show(messages.map(paragraph));
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
  let height = 0; // of the widget, in the classic renderer
  let grown = 0; // how much taller the node has become
  let widget;

  // Nodes 2.0 lays out and measures its nodes by itself. The classic renderer is told, also of nodes that are out of sight.
  const grow = (change) => {
    const before = node.computeSize()[1];
    change();
    const growth = isClassic() ? node.computeSize()[1] - before : 0;
    grown += growth;
    if (growth) node.setSize([node.size[0], node.size[1] + growth]);
    rootGraph().setDirtyCanvas(true, true);
  };
  const fit = () => {
    const wanted = Math.min(heightOf(text, node.size[0] - 2 * MARGIN), TALLEST) + 2 * MARGIN;
    if (wanted !== height) grow(() => (height = wanted));
  };

  grow(() => {
    widget = node.addDOMWidget(WIDGET, WIDGET, element, {
      serialize: false, // not sent with the prompt
      margin: MARGIN,
      getMinHeight: () => height,
      getMaxHeight: () => height,
      afterResize: fit,
    });
  });
  widget.serialize = false; // not saved with the workflow
  widget.show = (paragraphs) => {
    text.replaceChildren(...paragraphs);
    fit();
  };

  // The text is not saved, and neither is the room for it.
  const heightBefore = node.size[1] - grown;
  const { onSerialize } = node;
  node.onSerialize = function (data) {
    onSerialize?.call(this, data);
    const room = isClassic() ? grown : element.offsetHeight && element.offsetHeight + ROW_GAP;
    data.size[1] = Math.max(Math.min(heightBefore, data.size[1]), data.size[1] - room);
  };
  widget.release = () => {
    node.onSerialize = onSerialize;
    grow(() => {
      widget.onRemove?.();
      node.widgets.splice(node.widgets.indexOf(widget), 1);
    });
  };
  return widget;
}

function isClassic() {
  return !window.LiteGraph?.vueNodesMode;
}

/** How high a text is in a column of that width, wherever it is shown itself. */
function heightOf(text, width) {
  const column = document.createElement("div");
  column.className = "idadapter-messages";
  column.style.cssText = `position: absolute; visibility: hidden; width: ${width}px; max-height: none;`;
  column.append(text.cloneNode(true));
  document.body.append(column);
  const height = Math.ceil(column.getBoundingClientRect().height);
  column.remove();
  return height;
}

function drawAll() {
  for (const id of workflows.get(openWorkflow())?.keys() ?? []) draw(findNode(id));
}

api.addEventListener(EVENT, ({ detail }) => keep(workflowOf(detail.prompt_id), String(detail.node), detail.topic, detail.messages));
api.addEventListener("executed", ({ detail }) => {
  const report = detail.output?.[REPORT_KEY];
  const node = String(detail.display_node ?? detail.node);
  if (report && !node.includes(".")) keep(workflowOf(detail.prompt_id), node, "report", report); // not of a part of another node
});

onOpened(drawAll);

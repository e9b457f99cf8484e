// Says an error's whole sentence at once. ComfyUI's own panel shows it cut off, or only that a node failed.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { isOurs, onQueued, titleOf } from "./graph.js";

// The errors of idadapter_core/errors.py, by which a failure is ours when another node, a sampler for instance, runs our code.
const ERRORS = new Set([
  "CheckpointError",
  "ConfigError",
  "FaceError",
  "FacePackageError",
  "IDAdapterError",
  "InputError",
  "MismatchError",
  "NoFaceFoundError",
  "NotFiniteError",
  "RecognizerError",
  "TrainingError",
]);
// What ComfyUI calls a validation error that was put into words by a node.
const IN_WORDS = new Set([
  "custom_validation_failed",
  "exception_during_validation",
  "exception_during_inner_validation",
  "value_not_in_list",
]);

let shown = [];

function show(title, sentence) {
  const toasts = app.extensionManager?.toast;
  if (!toasts || shown.some((toast) => toast.summary === title && toast.detail === sentence)) return;
  // Without `life` it stays until it is closed, or until the next attempt: a long sentence takes time to read.
  const toast = { severity: "error", summary: title, detail: sentence, styleClass: "idadapter-error" };
  shown.push(toast);
  toasts.add(toast);
}

function clear() {
  for (const toast of shown) app.extensionManager?.toast?.remove(toast);
  shown = [];
}

api.addEventListener("execution_error", ({ detail }) => {
  if (isOurs(detail.node_type) || ERRORS.has(detail.exception_type)) {
    show(titleOf(detail.node_id, detail.node_type), detail.exception_message.trim());
  }
});
api.addEventListener("promptQueueing", clear);
onQueued((nodeErrors) => {
  for (const [id, { class_type, errors }] of Object.entries(nodeErrors)) {
    if (!isOurs(class_type)) continue;
    const sentences = errors.filter((error) => IN_WORDS.has(error.type)).map((error) => error.details);
    if (sentences.length) show(titleOf(id, class_type), sentences.join("\n"));
  }
});

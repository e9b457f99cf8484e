// Says an error's whole sentence at once. ComfyUI's own panel shows it cut off, or only that a node failed.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { isOurs, onQueued, titleOf } from "./graph.js";

// The errors of idadapter_core/errors.py, by which a failure is ours when another node, a sampler for instance, runs our code.
const ERRORS = new Set([
  "CheckpointError",
  "ConfigError",
  "DownloadError",
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
// What ComfyUI calls a validation error that a node put into words.
const IN_WORDS = new Set(["custom_validation_failed", "exception_during_validation", "exception_during_inner_validation"]);

// Above the tools at the bottom: the frontend's own errors open at the top right, its dialogs in the middle.
const style = document.createElement("style");
style.textContent = `
.p-toast.p-component.p-toast-top-right:has(.idadapter-error) { top: auto !important; right: auto !important; bottom: 76px !important;
  left: 50% !important; transform: translateX(-50%); width: min(40rem, 80vw); max-height: 40vh; overflow-y: auto; }
.idadapter-error .p-toast-detail { white-space: pre-line; overflow-wrap: anywhere; }
`;
document.head.append(style);

// Where the files of each input belong, below ComfyUI's models folder.
const FOLDERS = {
  adapter: "idadapter",
  text_branch: "idadapter",
  recognizer: "idadapter/recognizers",
  package: "insightface/models",
  identity: "idadapter/identities",
};

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
    const sentences = isOurs(class_type) ? errors.map(inWords).filter(Boolean) : [];
    if (sentences.length) show(titleOf(id, class_type), sentences.join("\n"));
  }
});

/** A validation error as a sentence; nothing where ComfyUI's panel says it well enough. */
function inWords({ type, details, extra_info: extra }) {
  if (IN_WORDS.has(type)) return details;
  if (type !== "value_not_in_list") return "";
  const [kind, options] = extra.input_config ?? [];
  const choices = options?.options ?? (Array.isArray(kind) ? kind : []);
  const folder = FOLDERS[extra.input_name];
  const where = folder
    ? `Put that file into models/${folder} and refresh the list (R), or choose another one; this pack's README says where its files come from.`
    : `Choose one of ${choices.join(", ")}.`;
  return `${extra.input_name}: "${extra.received_value}" is not among the choices. ${where}`;
}

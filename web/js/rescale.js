// Chooses the sensible mode where a user has Normalized Identity Rescaling cover other packs' attention.

import { app } from "../../../scripts/app.js";

const NODE = "IDAdapterRescale";
const EVERY = "every attention patch"; // SCOPES in nodes/adapter.py

// A saved prompt is put into widgets as if by hand, but keeps its meaning.
let loading = 0;
const loadApiJson = app.loadApiJson;
app.loadApiJson = async function (...parameters) {
  loading += 1;
  try {
    return await loadApiJson.apply(this, parameters);
  } finally {
    loading -= 1;
  }
};

app.registerExtension({
  name: "IDAdapter.Rescale",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const [scope, mode] = ["scope", "mode"].map((name) => node.widgets?.find((widget) => widget.name === name));
    if (!scope || !mode) return;
    const { callback } = scope;
    scope.callback = function (value, ...rest) {
      callback?.call(this, value, ...rest);
      if (!loading && value === EVERY && mode.value === "normalized") mode.value = "limit";
    };
  },
});

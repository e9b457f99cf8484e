"""An empty package: enough for `import torchaudio` at ComfyUI's start-up, which no test uses further."""

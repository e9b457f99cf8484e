"""pyproject.toml, as ComfyUI reads it for its registry."""

from __future__ import annotations

from tests.harness.comfy import REPOSITORY


def test_comfyui_reads_the_project() -> None:
    from comfy_config.config_parser import extract_node_configuration

    config = extract_node_configuration(str(REPOSITORY))
    assert config is not None
    assert config.project.name == "comfyui-idadapter"
    assert config.project.version
    assert config.tool_comfy.publisher_id
    assert config.tool_comfy.display_name
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert config.project.dependencies == required

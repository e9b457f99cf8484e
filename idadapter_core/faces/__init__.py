"""Faces in photos: detection, alignment, recognition features."""

from __future__ import annotations

from .align import align_face, similarity_transform
from .detector import (
    POLICIES,
    PROVIDERS,
    FaceAnalyzer,
    choose_providers,
    open_analyzer,
    order_faces,
    select_faces,
)
from .features import Extraction, crops_to_tensor, extract_features
from .images import check_image, image_name, to_bgr_uint8
from .iresnet import IRESNET100_LAYERS, IResNet, digest, load_iresnet, save_iresnet
from .iresnet_onnx import iresnet_state_dict_from_onnx
from .packages import find_packages, read_package, resolve_package
from .preview import draw_preview, face_mask

__all__ = [
    "IRESNET100_LAYERS",
    "POLICIES",
    "PROVIDERS",
    "Extraction",
    "FaceAnalyzer",
    "IResNet",
    "align_face",
    "check_image",
    "choose_providers",
    "crops_to_tensor",
    "digest",
    "draw_preview",
    "extract_features",
    "face_mask",
    "find_packages",
    "image_name",
    "iresnet_state_dict_from_onnx",
    "load_iresnet",
    "open_analyzer",
    "order_faces",
    "read_package",
    "resolve_package",
    "save_iresnet",
    "select_faces",
    "similarity_transform",
    "to_bgr_uint8",
]

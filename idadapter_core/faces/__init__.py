"""Faces in photos: detection, alignment, recognition features."""

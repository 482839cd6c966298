"""The DiT: configuration and presets, architecture, embeddings, rectified flow, text features."""

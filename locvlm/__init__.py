"""LocVLM: learning to localize objects improves spatial reasoning in visual LLMs (CVPR 2024), data to registry."""

__version__ = "0.1.0"

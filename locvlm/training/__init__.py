"""The loop, its engines, the Ray workers, the tiny foundation."""

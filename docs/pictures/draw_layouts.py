"""Draws layout-*.svg: which part of the model, and of a batch, each of four ranks on two nodes has.

python docs/pictures/draw_layouts.py
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
LAYERS, WIDTH, HEIGHT, GAP = 4, 96, 18, 4
SAMPLES = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759"]
INK, FAINT, HELD = "#333333", "#e6e6e6", "#8fb3d9"

# For each rank: the layers that it computes, its part (first, last) of every matrix' rows and columns while it rests,
# whose samples, and what goes between ranks.
LAYOUTS: dict[str, tuple[str, list[tuple[range, tuple[float, float], bool, int]], str]] = {
    "replicate": (
        "replicate = 4",
        [(range(4), (0, 1), False, rank) for rank in range(4)],
        "each rank: the whole model, its own samples; gradients (or parameters, by the sync) go between all",
    ),
    "shard": (
        "shard = 4",
        [(range(4), (rank / 4, (rank + 1) / 4), False, rank) for rank in range(4)],
        "each rank: a quarter of every matrix, its own samples; each block is gathered when it is needed",
    ),
    "tensor": (
        "replicate = 2, tensor = 2",
        [(range(4), (rank % 2 / 2, (rank % 2 + 1) / 2), True, rank // 2) for rank in range(4)],
        "a pair shares its samples, and each computes with its half of every matrix; sums go inside the node",
    ),
    "pipeline": (
        "replicate = 2, pipeline = 2",
        [(range(2) if rank % 2 == 0 else range(2, 4), (0, 1), False, rank // 2) for rank in range(4)],
        "each rank: half of the layers; micro-batches' activations go down, their gradients up",
    ),
    "hybrid": (
        "replicate = 2, shard = 2, sync local",
        [(range(4), (rank % 2 / 2, (rank % 2 + 1) / 2), False, rank) for rank in range(4)],
        "FSDP2 inside a node; between nodes parts of the model are averaged now and then, in the background",
    ),
}


def draw(title: str, ranks: list[tuple[range, tuple[float, float], bool, int]], words: str) -> str:
    """One picture."""
    parts = [f'<text x="12" y="20" font-weight="bold">{title}</text>']
    for number, (layers, (first, last), upright, feed) in enumerate(ranks):
        left = 24 + number * (WIDTH + 28) + (number // 2) * 24
        if number % 2 == 0:
            box = f'x="{left - 12}" y="34" width="{2 * WIDTH + 52}" height="158" rx="8" fill="none" stroke="{INK}"'
            parts.append(f'<rect {box} stroke-dasharray="4 3"/><text x="{left - 4}" y="50">node {number // 2}</text>')
        parts.append(f'<rect x="{left}" y="58" width="{WIDTH}" height="14" rx="3" fill="{SAMPLES[feed]}"/>')
        parts.append(f'<text x="{left + 4}" y="69" fill="white" font-size="10">samples {"abcd"[feed]}</text>')
        for layer in range(LAYERS):
            top = 80 + layer * (HEIGHT + GAP)
            parts.append(f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="{FAINT}"/>')
            if layer not in layers:
                continue
            x, w, y, h = left, float(WIDTH), float(top), float(HEIGHT)
            if upright:
                x, w = left + first * WIDTH, (last - first) * WIDTH
            else:
                y, h = top + first * HEIGHT, (last - first) * HEIGHT
            parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{HELD}"/>')
        parts.append(f'<text x="{left}" y="184">rank {number}</text>')
    parts.append(f'<text x="12" y="212">{words}</text>')
    style = 'font-family="sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="620" height="224" viewBox="0 0 620 224" {style}>'
        f'{background}<g fill="{INK}">{"".join(parts)}</g></svg>\n'
    )


if __name__ == "__main__":
    for name, (title, ranks, words) in LAYOUTS.items():
        (HERE / f"layout-{name}.svg").write_text(draw(title, ranks, words))

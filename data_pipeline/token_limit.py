"""What a text encoder's limit of tokens leaves out of a prompt, in words for people. Published pipelines cut prompts in silence."""

SHOWN = 40
CUT = "caption cut at the text encoder's tokens"
"""Note of a sample whose caption is longer than its encoder reads: a key of "changed" in dataset.json."""


def describe_cut(encoder: str, tokens: int, limit: int, rest: str) -> str:
    """tokens: of the whole prompt; limit: of them that are read; rest: the prompt from the first one on that is not."""
    begin = rest.strip()
    shown = begin if len(begin) <= SHOWN else f"{begin[:SHOWN]}..."
    return f"{encoder} reads {limit} of its {tokens} tokens, and nothing from {shown!r} on"

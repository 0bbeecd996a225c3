"""The picture at the head of the README."""

from studies.compare import diagram


def test_the_diagram_shows_what_is_saved():
    texts = " ".join(text.get_text() for text in diagram.checkpoints().axes[0].texts)
    assert all(name in texts for name in ("bi/", "modes/", "adapter/", "ubmoe/"))

"""Sections of a model card: each replaces itself and nothing else, also those that 0.2 wrote without a name."""

from __future__ import annotations

from chronomoe_hf.model_card import HEADINGS, put_section

OURS = "---\ntags: [x]\n---\n# Mine\n\nText.\n"
ROUTING, EXPORT = f"{HEADINGS['routing']}\n\nrouting", f"{HEADINGS['export']}\n\nexport"


def test_two_sections_stand_beside_each_other_in_either_order() -> None:
    for first, second in (("routing", "export"), ("export", "routing")):
        text = OURS
        for _ in range(2):
            for name in (first, second):
                text = put_section(text, name, f"{HEADINGS[name]}\n\n{name}")
        assert text.startswith(OURS) and all(text.count(each) == 1 for each in (ROUTING, EXPORT))


def test_writing_again_replaces_the_section_and_keeps_the_rest_byte_for_byte() -> None:
    once = put_section(OURS, "routing", ROUTING)
    around = once + "\nAfter.\n"
    assert put_section(around, "routing", ROUTING) == around
    assert put_section(around, "routing", f"{ROUTING} again") == around.replace(ROUTING, f"{ROUTING} again")
    assert put_section("", "export", EXPORT).startswith("<!-- chronomoe:export:start -->")


def test_a_section_without_a_name_is_known_by_its_heading() -> None:
    def old(section: str) -> str:
        return f"<!-- chronomoe:start -->\n{section}\n<!-- chronomoe:end -->\n"

    text = OURS + "\n" + old(EXPORT)
    both = put_section(text, "routing", ROUTING)
    assert both.startswith(text), "the older section of the export must stay"
    again = put_section(OURS + "\n" + old(ROUTING) + "\nAfter.\n", "routing", f"{ROUTING} again")
    assert again.count(HEADINGS["routing"]) == 1 and "again" in again and "<!-- chronomoe:start" not in again
    assert again.startswith(OURS) and again.endswith("\nAfter.\n")

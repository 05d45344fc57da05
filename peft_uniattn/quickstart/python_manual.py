"""Question-answer pairs cut from the Python reference manual that ships with every Python (`pydoc_data.topics`).

The topics are plain text as Sphinx writes it: titles are underlined, blocks are separated by blank lines, and
indentation alone says what a block is. Prose stands at the indentation of the title, note, list item or signature
that it belongs to; whatever is indented further is code or grammar.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

LONGEST_ANSWER = 900
SHORTEST_ANSWER = 60

UNDERLINE = re.compile(r"([*=~^-])\1{2,}$")
# The first paragraph of a description: it begins like a sentence and ends like one.
DESCRIPTION = re.compile(r"[A-Z\"*][^\n]* .*[.:]\)?$", re.DOTALL)
LIST_MARKER = re.compile(r"(?:\*|\d+\.|[a-z]\.) +")
ADMONITION = re.compile(r"(?:Note|Warning|Important|Caution|Tip|Hint):$")
NOISE = re.compile(r"=====|\*\*Source code|(?:New|Added|Changed|Deprecated|Removed) (?:in|since) version|See ")
SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\.\.)[.!?][)\"”’]*(?=\s|$)")
UNFINISHED = (":", ";", ",", "—")


@dataclass
class Section:
    """A titled part of a topic, or the description of one documented name."""

    title: str
    documented_in: str = ""  # the heading above a documented name; empty for a section with a heading of its own
    pieces: list[str] = field(default_factory=list)


def examples_by_topic(topics: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Cut every topic into question-answer pairs.

    Topics contain each other ("compound" holds "if", "for", "while" ...). A passage counts for the shortest topic that
    has it, so that no passage is in two topics.

    Args:
        topics: topic name → its text, as in `pydoc_data.topics.topics`.

    Returns:
        Topic name → its pairs, in the manual's order. Topics wholly contained in shorter ones are left out.
    """
    seen: set[str] = set()
    examples: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for question, answer in _topic_examples(topics[name]):
            if answer in seen or question in seen:
                continue
            seen |= {question, answer}
            examples.setdefault(name, []).append((question, answer))
    return examples


def _topic_examples(text: str) -> Iterator[tuple[str, str]]:
    sections = _sections(text)
    topic_title = sections[0].title if sections else ""
    for section in sections:
        for number, answer in enumerate(_answers(section.pieces)):
            if len(answer) >= SHORTEST_ANSWER:
                opening = answer.split("```")[0].split()[:6] if number else None
                yield _question(section, topic_title, opening), answer


def _question(section: Section, topic_title: str, opening: list[str] | None) -> str:
    if section.documented_in:
        about = f"`{section.title}` ({section.documented_in})"
    elif section.title == topic_title:
        about = section.title
    else:
        about = f"{section.title} ({topic_title})"
    about = re.sub(r"^The ", "the ", about)
    if opening:
        return f'What else does the Python reference manual say about {about}? Start at "{" ".join(opening)} …".'
    if section.documented_in and "(" in section.title:
        return f"What does `{section.title}` do in Python ({section.documented_in})?"
    return f"What does the Python reference manual say about {about}?"


def _sections(text: str) -> list[Section]:
    """Split a topic at its headings and signatures; footnotes, tables, "See also" and version notes are left out."""
    sections: list[Section] = []
    nowhere = Section("")
    # Indentations at which prose may stand, innermost last, each with the section that it belongs to.
    open_levels = [(0, nowhere)]
    heading = ""
    blocks = [block for block in re.split(r"\n\s*\n", text.rstrip()) if block.strip()]
    for block, following in zip(blocks, [*blocks[1:], ""], strict=True):
        lines, body, indent = block.strip("\n").splitlines(), block.strip(), _indent(block.strip("\n"))
        if len(lines) == 2 and UNDERLINE.match(lines[1]):
            heading = lines[0]
            sections.append(Section(heading))
            open_levels = [(0, sections[-1])]
            continue
        while open_levels[-1][0] > indent:
            open_levels.pop()
        level, section = open_levels[-1]
        if body[0] in "+|":
            if section.pieces and section.pieces[-1].endswith(UNFINISHED):  # it introduced the table
                section.pieces[-1:] = filter(None, [_up_to_last_sentence(section.pieces[-1])])
        elif level != indent or body.startswith(">>>"):
            _add_code(section.pieces, [line[min(_indent(line), level + 3) :] for line in lines])
        elif body == "-[ Footnotes ]-":
            open_levels = [(0, nowhere)]
        elif body == "See also:":
            open_levels.append((indent + 2, nowhere))
        elif ADMONITION.match(body):
            open_levels.append((indent + 2, section))
        elif NOISE.match(body):
            continue
        elif _indent(following) == indent + 3 and body[-1] not in ".:,;" and DESCRIPTION.match(following.strip()):
            # A documented name, such as `str.join(iterable)`, `h(elp) [command]` or `key in d`.
            sections.append(Section(lines[0].strip(), documented_in=heading))
            open_levels.append((indent + 3, sections[-1]))
        else:
            marker = LIST_MARKER.match(body)
            if marker:
                open_levels.append((indent + marker.end(), section))
            elif len(lines) > 1 and _indent(lines[1]) > indent:  # a term with its definition below
                open_levels.append((_indent(lines[1]), section))
                lines[0] += ":"
            section.pieces.append(_unwrap(lines))
    return sections


def _answers(pieces: list[str]) -> Iterator[str]:
    """Pack a section's pieces into answers of bounded length that begin and end at whole thoughts."""
    answer = ""
    for unit in map(_trimmed, _units(pieces)):
        if answer and len(answer) + 2 + len(unit) > LONGEST_ANSWER:
            yield answer
            answer = ""
        answer = f"{answer}\n\n{unit}" if answer and unit else answer or unit
    if answer:
        yield answer


def _units(pieces: list[str]) -> Iterator[list[str]]:
    """Group pieces that can't be understood apart: code and lists stay with the sentence that introduces them."""
    unit: list[str] = []
    for piece in pieces:
        if unit and not (piece.startswith("```") or piece[0].islower() or unit[-1].endswith(UNFINISHED)):
            yield unit
            unit = []
        unit.append(piece)
    if unit:
        yield unit


def _trimmed(unit: list[str]) -> str:
    while len(unit) > 1 and len("\n\n".join(unit)) > LONGEST_ANSWER:
        unit = unit[:-1]
    text = "\n\n".join(unit)
    if len(text) > LONGEST_ANSWER and text.startswith("```"):
        return ""
    if len(text) > LONGEST_ANSWER or text.endswith(UNFINISHED):
        return _up_to_last_sentence(text[:LONGEST_ANSWER])
    return text


def _up_to_last_sentence(text: str) -> str:
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def _add_code(pieces: list[str], lines: list[str]) -> None:
    code = "\n".join(lines)
    if pieces and pieces[-1].startswith("```"):
        pieces[-1] = pieces[-1].removesuffix("\n```") + f"\n\n{code}\n```"
    else:
        pieces.append(f"```\n{code}\n```")


def _unwrap(lines: list[str]) -> str:
    """Join hard-wrapped lines (some break after a hyphen) and drop the marks of the footnotes, which are left out."""
    text = ""
    for line in map(str.strip, lines):
        separator = "\n" if LIST_MARKER.match(line) else "" if re.search(r"\w-$", text) and line[0].islower() else " "
        text = f"{text}{separator}{line}" if text else line
    return re.sub(r" \[\d+\](?=[\s.,;:)]|$)", "", re.sub(r"  +", " ", text))


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" "))

"""ShareGPT: conversations that people had with ChatGPT and shared.

Read from the cleaned collection of the Vicuna project, in which long conversations are cut into several rows; where
that cannot be had from its variant without refusals, and last from the raw pages of the upstream collection.
"""

from mixture.formats import ROLES
from mixture.html_markdown import markdown
from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="anon8231489123/ShareGPT_Vicuna_unfiltered",
    revision="192ab2185289094fc556ec8ce5ce1e8e587154ca",
    licence="Apache-2.0 for the collection; the rights in what people and ChatGPT wrote are not cleared",
    commercial_use=True,
    rows={"train": None},
    files={"train": "ShareGPT_V3_unfiltered_cleaned_split.json"},
    format="sharegpt",
    fallback=[
        {"files": {"train": "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json"}},
        {
            "id": "RyokoAI/ShareGPT52K",
            "revision": "6f9b78cc1dd15dbb51d3c51ccc219c558962fd77",
            "licence": "CC0-1.0 for the collection; the rights in what people and ChatGPT wrote are not cleared",
            "files": {"train": ["sg_90k_part1.json", "sg_90k_part2.json"]},
        },
    ],
)


def read_rows(rows):
    """Rows that hold an exchange of question and answer; `parent` is the conversation that a row is a piece of."""
    for row in rows:
        turns = [plain_turn(turn) for turn in row["conversations"] or [] if turn.get("value")]
        roles = [ROLES.get(turn["from"]) for turn in turns]
        if "user" in roles and roles[roles.index("user") :][1:2] == ["assistant"]:
            yield {"id": row["id"], "parent": row["id"].rpartition("_")[0] or row["id"], "conversations": turns}


def plain_turn(turn):
    """A turn without the page's own fields; an answer kept as a piece of HTML, as raw pages have it, as Markdown."""
    value = markdown(turn["value"]) if turn["value"].startswith(("<div", "<p>")) else turn["value"]
    return {"from": turn["from"], "value": value}


get_custom_dataset = HubRows(SOURCE, read_rows)

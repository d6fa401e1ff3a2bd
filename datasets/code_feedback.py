"""CodeFeedback: 157 k questions about code in many languages, filtered for difficulty, with generated answers.

Some rows repeat tasks of HumanEval: decontaminate before you report a score on it.
"""

from mixture.hub import HubRows, HubSource

SOURCE = HubSource(
    id="m-a-p/CodeFeedback-Filtered-Instruction",
    revision="a08c213a9748c66c15d0225814be80a2e77adf4a",
    licence="Apache-2.0; answers of OpenAI models, whose terms of use may bind you",
    commercial_use=True,
    rows={"train": 156526},
    files={"train": "CodeFeedback-Filtered-Instruction.jsonl"},
    format="query/answer",
)

get_custom_dataset = HubRows(SOURCE)

"""The report page: what it draws, and that nothing a model or a user wrote can break it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jobs import launch
from jobs.config import PROJECT
from jobs.plan import plan_run
from jobs.preflight import check_run
from jobs.report import MAX_POINTS, report_page, series
from jobs.status import read_status
from jobs.status_view import scores as scores_of
from training.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of two blocks that crashed once in between and repeated a step."""
    folders = ["--runs_dir", str(tmp_path / "runs"), "--data_dir", str(tmp_path / "data"), "--cluster", "local"]
    checked = check_run(PROJECT / "configs/test.yaml", folders)
    run = launch.open_run_folder(checked, plan_run(checked).data_key, print)
    for step, loss in [(1, 8.0), (2, 6.0), (3, 99.0), (3, 5.0), (4, 4.0)]:
        run.record_metrics(step=step, horizon_steps=4, epoch=step / 2, block=(step + 1) // 2, loss=loss, lr=1e-3)
    run.record_event("block_end", step=2, epoch=1.0, block=1, eval_loss=6.5)
    run.record_event("block_end", step=4, epoch=2.0, block=2, eval_loss=4.5)
    return run


def polylines(page: str) -> list[list[str]]:
    return [points.split() for points in re.findall(r"<polyline points='([^']*)'", page)]


def test_the_loss_curve_has_each_step_once_and_a_dot_for_each_block(run: RunFolder) -> None:
    page = report_page(run)
    training, test, *_ = polylines(page)
    assert len(training) == 4
    assert len(test) == 2
    assert page.count("<circle") == 2
    assert ">8</text>" in page and ">99</text>" not in page


def test_a_run_that_has_not_begun_has_a_page_too(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").unlink()
    (run.path / "events.jsonl").unlink()
    assert report_page(run).count("nothing yet") == 4


def test_rewards_of_a_model_s_own_answers_have_their_curves(run: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        rewards = {"reward": step / 10, "reward_module": 0.2, "reward_judge": 0.1, "reward_std": 0.3, "kl": 0.01}
        run.record_metrics(step=step, loss=0.0, lr=1e-3, answer_tokens=5.0, **rewards)
    run.record_event("block_end", step=4, epoch=2.0, block=2, eval_reward=0.5)
    page = report_page(run)
    titles = re.findall("<figcaption>([^<]*)", page)
    assert titles[:3] == [
        "Mean reward (line: training, dots: test split at block ends)", "Mean reward by module", "Mean reward by judge"
    ]  # fmt: skip
    assert "Tokens of an answer" in titles and "Mean reward by std" not in titles
    assert len(polylines(page)[0]) == 4 and len(polylines(page)[1]) == 1


def test_answers_of_the_model_are_shown_as_text(run: RunFolder) -> None:
    answer = "<script>alert('x')</script> & <b>"
    run.evaluation.write_text(json.dumps({"loss": 1.5, "examples": [{"prompt": "1 < 2?", "prediction": answer}]}))
    page = report_page(run)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page


def test_the_guesses_of_a_draft_are_shown_by_source_told_and_measured(run: RunFolder) -> None:
    told = {"all": 1.75, "ultrachat": 2.5, "<sharegpt>": 1.25}
    draft = {
        source: {"simulated_acceptance_length": length, "acceptance_1": length / 4} for source, length in told.items()
    }
    scores = {"acceptance_length": 1.5, "acceptance_length_by_source": {"ultrachat": 2.25}, "models": {"draft": draft}}
    run.evaluation.write_text(json.dumps(scores))
    page = report_page(run)
    assert "Accepted guesses by source</h2>" in page and "Compared on" not in page
    assert "<tr><td>all</td><td>1.75</td><td>0.4375</td><td>1.5</td></tr>" in page
    assert "<tr><td>ultrachat</td><td>2.5</td><td>0.625</td><td>2.25</td></tr>" in page
    assert "<tr><td>&lt;sharegpt&gt;</td><td>1.25</td><td>0.3125</td><td></td></tr>" in page
    status = scores_of(read_status(run).evaluation or {})
    assert "  ultrachat: simulated acceptance length 2.5, acceptance 1 0.625, acceptance length 2.25" in status


def test_the_page_needs_nothing_from_elsewhere_and_closes_its_tags(run: RunFolder) -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.links: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.links += [value for key, value in attributes if key in ("src", "href") and value]
            if tag != "meta":
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    tags = Tags()
    tags.feed(report_page(run))
    assert tags.open == [] and tags.links == []


def test_a_long_run_is_thinned_and_keeps_its_last_point() -> None:
    metrics = [{"step": step, "loss": 1.0 / step} for step in range(1, 10_001)] + [
        {"step": 10_001, "loss": float("nan")}
    ]
    points = series(metrics, "loss")
    assert len(points) <= MAX_POINTS + 1
    assert points[0][0] == 1 and points[-1][0] == 10_000

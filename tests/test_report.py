"""The report on made-up analyses: what must be on the page, and every shape of model that it must survive."""

import dataclasses
import math
import re
import struct
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from etils import epath
from matplotlib.colors import to_rgb
from pages import Page, assert_self_contained, svgs

from clp_jax import selection
from clp_jax.analysis import Analysis, EvidenceOptions
from clp_jax.findings import Choice, Findings, Size
from clp_jax.models import Tower
from clp_jax.report import write_report
from clp_jax.report.canvas import LIGHT, PNG_DPI, inline_svg, png, style
from clp_jax.report.heatmaps import heat_map
from clp_jax.report.page import page
from clp_jax.report.view import group_views
from clp_jax.selection import GateEvidence
from clp_jax.similarity import VARIANTS, TowerSimilarity

EPISODES = 6
FULL_LOSS = 0.0831
DASH = "\N{EN DASH}"
TWINS = (1, 2, 4, 6, 8, 9)


def toy_tower(depth: int, *, twins: Sequence[int], unread: Sequence[int] = (), seed: int = 0) -> TowerSimilarity:
    """Similarity of a random residual stream in which some blocks add next to nothing."""
    rng, states = np.random.default_rng(seed), depth + 1
    size = np.where(np.isin(np.arange(depth), twins), 0.1, rng.uniform(0.3, 0.6, depth))
    size[0] = 2.0
    stream = [rng.normal(size=(EPISODES, 24, 8))]
    for scale in size:
        stream.append(stream[-1] * 0.95 + scale * rng.normal(size=stream[0].shape))
    h = np.stack(stream)
    clusters = np.stack([_four_hsic(h[:, episode]) for episode in range(EPISODES)])
    norm = np.linalg.norm(h, axis=-1)
    cosine = np.einsum("iend,jend->ijen", h, h) / (norm[:, None] * norm[None])
    squared = ((h[:, None] - h[None]) ** 2).sum(-1)
    hsic = clusters.sum(0)
    own = np.sqrt(np.diagonal(hsic, axis1=1, axis2=2))
    measured = {
        "cka": hsic / (own[:, :, None] * own[:, None, :]),
        "cosine": cosine.mean((2, 3)),
        "angle": np.arccos(cosine.clip(-1, 1)).mean((2, 3)) / np.pi,
        "residual": np.sqrt((squared / norm[:, None] ** 2).mean((2, 3))),
        "mse": squared.mean((2, 3)) / h.shape[-1],
        "channel_share": np.full(states, 0.2),
        "clusters": clusters,
    }
    in_float32 = {key: value.astype(np.float32) for key, value in measured.items()}
    return TowerSimilarity(**in_float32, read=~np.isin(np.arange(states), unread), samples=EPISODES * 24)


def _four_hsic(h: np.ndarray) -> np.ndarray:
    """The four variants for one episode [l, n, d]; the debiased ones are only near enough for a picture."""
    unit = h / np.sqrt((h**2).mean(-1, keepdims=True))
    found = []
    for x in (h - h.mean(1, keepdims=True), unit - unit.mean(1, keepdims=True)):
        biased = (np.einsum("ind,jne->ijde", x, x) ** 2).sum((2, 3))
        scale = (x**2).sum((1, 2))
        found += [biased, biased - 0.8 * np.outer(scale, scale) / x.shape[1]]
    return np.stack(found)


def toy(
    depths: dict[str, int],
    *,
    coupled: tuple[tuple[str, ...], ...] = (),
    remove: int = 6,
    measured: Sequence[str] | None = None,
    unread: dict[str, tuple[int, ...]] | None = None,
    criterion: str = "clp",
    twins: Sequence[int] = TWINS,
    seed: int = 0,
) -> tuple[Analysis, Findings]:
    """An analysis with everything measured, and what it comes to under made-up losses."""
    measured, unread = list(depths) if measured is None else measured, unread or {}
    towers = {
        name: toy_tower(depths[name], twins=twins, unread=unread.get(name, ()), seed=seed + i)
        for i, name in enumerate(measured)
    }
    rng = np.random.default_rng(seed)
    meta = {"observations": 48, "episodes": EPISODES, "sampling": {"samples": "tokens", "max_samples": 2048}}
    shape = tuple(Tower(name, depth) for name, depth in depths.items())
    alone = tuple((name,) for name in sorted(measured, reverse=True) if not any(name in group for group in coupled))
    analysis = Analysis("pi0", shape, coupled + alone, towers, {}, meta)
    gates = {
        group: GateEvidence(sensitivity=rng.uniform(0.001, 0.05, depths[group[0]]).astype(np.float32))
        for group in analysis.groups
    }
    analysis = dataclasses.replace(analysis, gates=gates)
    counts = {group: remove if i == 0 else 0 for i, group in enumerate(analysis.groups)}
    choices = []
    for name in dict.fromkeys([criterion, *selection.CRITERIA]):
        evidence = {group: analysis.evidence(group) for group in counts}
        if all(name in selection.available(e) for e in evidence.values()):
            picks = {group: selection.select(name, e, remove=counts[group]) for group, e in evidence.items()}
            removed = next(iter(picks.values())).removed
            choices.append(Choice(name, analysis.plan(picks, name), FULL_LOSS * (1 + 0.01 * sum(removed))))
    findings = Findings(
        checkpoint="gs://bucket/pi0_libero/params",
        plan=choices[0].plan,
        choices=tuple(choices),
        full_loss=FULL_LOSS,
        loss_data="12 held-out observations",
        before=Size(3_238_000_000, 4_210_000_000_000, 5_020_000_000_000),
        after=Size(2_475_000_000, 3_090_000_000_000, 3_610_000_000_000),
        intervals={name: selection.cka_interval(t.clusters[:, 0], resamples=200) for name, t in towers.items()},
        stability={"+".join(group): rng.uniform(0, 1, depths[group[0]]) for group, count in counts.items() if count},
        warnings=(),
    )
    return analysis, findings


def pi0_like(**changes) -> tuple[Analysis, Findings]:
    pair = (("vlm", "action"),)
    depths = {"vision": 27, "vlm": 18, "action": 18}
    shape = {"coupled": pair, "measured": ("vlm", "action"), "unread": {"vlm": (18,)}}
    return toy(depths, **(shape | changes))


def written(folder: Path, analysis: Analysis, findings: Findings, options: EvidenceOptions = EvidenceOptions()) -> str:
    """The page; its figures are beside it in the folder."""
    write_report(epath.Path(folder), analysis, findings, options)
    return (folder / "report.html").read_text(encoding="utf-8")


def page_without_figures(analysis: Analysis, findings: Findings, options: EvidenceOptions = EvidenceOptions()) -> str:
    """Drawing is what takes time."""
    return page(analysis, findings, options, group_views(analysis, findings, options), defaultdict(str))


@pytest.fixture(scope="module")
def pi0(tmp_path_factory):
    """A report about a model like π0: folder, page, analysis, findings. Names and warnings try to break out."""
    analysis, findings = pi0_like()
    findings = dataclasses.replace(
        findings,
        checkpoint="<script>alert('checkpoint')</script>",
        warnings=("<script>alert('warning')</script> & more",),
    )
    analysis = dataclasses.replace(analysis, meta=analysis.meta | {"<script>key": "<script>value"})
    folder = tmp_path_factory.mktemp("report")
    before = dict(matplotlib.rcParams)
    text = written(folder, analysis, findings)
    assert dict(matplotlib.rcParams) == before
    return folder, text, analysis, findings


def test_page_is_self_contained_and_well_formed(pi0):
    _, text, _, _ = pi0
    assert_self_contained(text)
    assert len(svgs(text)) == 5  # two matrices, profile, variants, cost curve


def test_page_escapes_what_it_did_not_write(pi0):
    _, text, _, _ = pi0
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 5  # twice the checkpoint, in the header and the settings
    assert "alert(&#x27;warning&#x27;)&lt;/script&gt; &amp; more" in text


def test_page_shows_sizes_counts_and_losses(pi0):
    _, text, _, findings = pi0
    for part in (
        "<p>18 <i>→</i> <b>12</b></p>",
        "<p>27 <i>→</i> <b>27</b></p>",
        "<p>3.24 <i>→</i> <b>2.48 B</b></p>",
        "<p>4.21 <i>→</i> <b>3.09 TFLOP</b></p>",
        "<p>5.02 <i>→</i> <b>3.61 TFLOP</b></p>",
        f"<p>0.08310 <i>→</i> <b>{findings.choices[0].loss:#.4g}</b></p>",
        "76.4% stays",
        "48 observations from 6 episodes",
        "144 of vlm, 144 of action",
        "12 held-out observations",
        "flow-matching loss with fixed noise and times",
    ):
        assert part in text


def test_every_removed_block_is_marked(pi0):
    _, text, _, findings = pi0
    removed = list(findings.plan.removed("vlm"))
    assert removed == sorted(TWINS)
    page = Page(text)
    assert page.marked_blocks() == removed
    assert [cells[-1] == "removed" for _, cells in page.tables["blocks"]] == [i in removed for i in range(18)]
    for matrix in svgs(text)[:2]:
        styles = [element.get("style", "") for element in matrix.iter()]
        # A cell in each of two bands, and the legend's; two frames, as the matrix is symmetric.
        assert sum("fill: var(--removed)" in style for style in styles) == 2 * len(removed) + 1
        assert sum("stroke: var(--removed)" in style for style in styles) == 2 * len(removed)


def test_block_table_has_the_numbers(pi0):
    _, text, analysis, findings = pi0
    rows = [cells for _, cells in Page(text).tables["blocks"]]
    action, block = analysis.towers["action"], 7
    low, high = findings.intervals["action"][:, block, block + 1]
    assert f"{action.cka[0, block, block + 1]:.4f} [{low:.4f}, {high:.4f}]" in rows[block]
    assert f"{action.cosine[block, block + 1]:.4f}" in rows[block]
    assert f"{action.residual[block, block + 1]:#.3g}" in rows[block]
    assert f"{findings.stability['vlm+action'][block]:.0%}" in rows[block]
    # Nothing reads the state after the VLM's last block.
    assert rows[17][1:4] == [DASH, DASH, DASH]
    assert "nothing reads state 18" in text


def test_criteria_are_sorted_by_loss(pi0):
    _, text, _, findings = pi0
    rows = Page(text).tables["criteria"]
    shown = [float(cells[2]) for _, cells in rows]
    assert shown == sorted(shown)
    assert len(shown) == len(findings.choices)
    assert [cells[0] for marked, cells in rows if marked] == ["clpthe plan"]
    first = next(cells for _, cells in rows if cells[0] == "first")
    assert first[1] == "vlm+action: 12 13 14 15 16 17"
    assert float(first[3]) == pytest.approx(1 + 0.01 * sum(range(12, 18)), abs=0.0005)


def test_figures_take_the_colours_of_the_page(pi0):
    _, text, _, _ = pi0
    defined = set(re.findall(r"--(\w+):#", text))
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= defined | {"share"}
    figures = "".join(re.findall(r"<figure[^>]*>(<svg.*?</svg>)", text, re.DOTALL))
    assert not [colour for colour in LIGHT.values() if colour in figures]


def test_slides_have_their_size_and_content(pi0):
    folder, _, _, _ = pi0
    names = ["cka_action", "cka_vlm", "costs_vlm+action", "criteria", "profile_vlm+action", "variants_vlm+action"]
    assert {path.name for path in folder.iterdir()} == {*(f"{name}.png" for name in names), "report.html"}
    width, height = struct.unpack(">II", (folder / "cka_vlm.png").read_bytes()[16:24])
    # Releases of matplotlib round half a pixel differently.
    assert (width, height) == pytest.approx((5.6 * PNG_DPI, 5.95 * PNG_DPI), abs=1)
    for name in names:
        pixels = matplotlib.image.imread(folder / f"{name}.png")
        orange = np.abs(pixels[..., :3] - to_rgb(LIGHT["removed"])).max(-1) < 0.02
        assert orange.sum() > 100
        assert pixels[..., :3].mean() > 0.4


@pytest.mark.parametrize(("depth", "remove"), [(2, 0), (2, 1), (48, 24)])
def test_any_depth(tmp_path, depth, remove):
    analysis, findings = toy({"vlm": depth}, remove=remove, twins=range(1, depth, 2))
    text = written(tmp_path, analysis, findings)
    assert Page(text).marked_blocks() == list(findings.plan.removed("vlm"))
    assert (tmp_path / "criteria.png").exists() == (remove > 0)
    assert len(text.encode()) < 2_000_000


def test_same_findings_give_the_same_bytes():
    case = toy({"vlm": 2}, remove=1, twins=(1,))
    drawn = []
    for _ in range(2):
        with style("cka_vlm"):
            figure = heat_map(group_views(*case, EvidenceOptions())[0], "vlm", (0.01, 1.0))
            drawn.append((png(figure), inline_svg(figure, "CKA")))
    assert drawn[0] == drawn[1]
    assert page_without_figures(*case) == page_without_figures(*case)


def test_towers_of_any_name_and_depth(tmp_path):
    hostile = "../<script>$x_1$"
    analysis, findings = toy({hostile: 3, "dit": 4}, remove=2, twins=(1, 3))
    text = written(tmp_path, analysis, findings)
    assert "<script" not in text
    assert "../&lt;script&gt;$x_1$: 3 blocks, 0 removed" in text
    assert "dit: 4 blocks, 2 removed" in text
    assert len(svgs(text)) == 8
    assert {"cka_dit.png", "cka_..__script__x_1_.png"} <= {path.name for path in tmp_path.iterdir()}


def test_fast_model_without_losses_gates_and_intervals(tmp_path):
    """π0-FAST, analysed on one episode: cross entropy, no sampling cost, a dash for whatever was not measured."""
    analysis, findings = toy({"vlm": 4}, remove=1, twins=(1,))
    choices = tuple(dataclasses.replace(choice, loss=math.nan) for choice in findings.choices)
    bare = dataclasses.replace(
        findings,
        choices=choices,
        full_loss=math.nan,
        before=Size(2_900, 800, None),
        after=Size(1_900, 500, None),
        intervals={},
        stability={},
    )
    text = written(tmp_path, dataclasses.replace(analysis, kind="pi0_fast", gates={}, meta={}), bare)
    assert "Layer pruning of pi0_fast" in text
    assert "cross entropy of the action tokens" in text
    assert "sampling a chunk" not in text
    assert "<p>2.90 <i>→</i> <b>1.90 K</b></p>" in text
    assert "There are no intervals" in text
    assert "95 % interval" not in text
    tables = Page(text).tables
    assert {cells[2] for _, cells in tables["criteria"]} == {"not measured"}
    assert {cells[3] for _, cells in tables["criteria"]} == {DASH}
    assert {len(cells) for _, cells in tables["blocks"]} == {6}  # block, CKA, cosine, residual, score, plan
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_matrix_with_holes(tmp_path):
    """Debiased HSIC can be negative, and then there is no CKA."""
    analysis, findings = toy({"vlm": 4}, remove=2, twins=(1, 2))
    cka = analysis.towers["vlm"].cka.copy()
    cka[1] = np.nan
    towers = {"vlm": dataclasses.replace(analysis.towers["vlm"], cka=cka)}
    holes = dataclasses.replace(analysis, towers=towers)
    tables = Page(written(tmp_path, holes, findings, EvidenceOptions("raw", "debiased"))).tables
    assert [cells[1] for _, cells in tables["blocks"]] == [DASH] * 4
    assert [cells[1] == "not possible: too few values are known" for _, cells in tables["readings"]] == [
        variant == ("raw", "debiased") for variant in VARIANTS
    ]


def test_unmeasured_loss_of_one_criterion_comes_last():
    analysis, findings = toy({"vlm": 4}, remove=1, twins=(1,))
    lost = dataclasses.replace(findings.choices[0], loss=math.nan)
    text = page_without_figures(analysis, dataclasses.replace(findings, choices=(lost, *findings.choices[1:])))
    assert Page(text).tables["criteria"][-1][1][0] == "clpthe plan"


def test_twins_are_told_apart_beyond_the_fourth_nine():
    """Real twins have a CKA of 0.99999: four decimals would show 1 for all of them."""
    analysis, findings = toy({"vlm": 4}, remove=2, twins=(1, 2))
    cka = analysis.towers["vlm"].cka.copy()
    cka[:, 1, 2], cka[:, 2, 3] = 0.999954, 0.99923
    towers = {"vlm": dataclasses.replace(analysis.towers["vlm"], cka=cka)}
    text = page_without_figures(
        dataclasses.replace(analysis, towers=towers), dataclasses.replace(findings, intervals={})
    )
    assert [cells[1] for _, cells in Page(text).tables["blocks"]][1:3] == ["0.999954", "0.99923"]


def test_plan_made_by_hand():
    analysis, findings = toy({"vlm": 4}, remove=1, twins=(1,))
    plan = dataclasses.replace(findings.plan, criterion="manual", scores={})
    by_hand = dataclasses.replace(findings, plan=plan, choices=(Choice("manual", plan, 0.1),))
    text = page_without_figures(analysis, by_hand)
    assert Page(text).marked_blocks() == list(plan.removed("vlm"))
    assert "Diamonds" not in text


def test_reading_decides_which_matrix_counts():
    analysis, findings = toy({"vlm": 4}, remove=1, twins=(1,))
    tables = Page(page_without_figures(analysis, findings, EvidenceOptions("rms", "debiased"))).tables
    assert tables["blocks"][2][1][1].startswith(f"{analysis.towers['vlm'].cka[3, 2, 3]:.4f}")
    assert [cells[0] for marked, cells in tables["readings"] if marked] == ["rms, debiased"]

"""Similarity statistics of whole towers against plain NumPy on the captured hidden states."""

import dataclasses

import family_cases
import jax
import numpy as np
import pytest
import reference_cka
import toys

from clp_jax import similarity
from clp_jax.data import arrange
from clp_jax.errors import InputError
from clp_jax.models import Gates, build, family_of
from clp_jax.sharding import make_mesh
from clp_jax.similarity import VARIANTS, Sampling, batches, collect, samples_of_group

CKA_TOLERANCE = 1e-5


def measure(arch, params, data, *, group_size=4, groups_per_batch=8, sampling=Sampling(), mesh=None):
    mesh = mesh or make_mesh()
    arrangement = arrange(data.episodes, group_size)
    stream = batches(data, arrangement, groups_per_batch, mesh)
    return collect(arch, params, stream, arrangement, sampling, mesh=mesh)


def one_episode(data):
    """The same observations as one episode, and so as one cluster."""
    return dataclasses.replace(data, arrays=data.arrays | {"episode_index": np.zeros(len(data), int)})


def one_device():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "fsdp"))


def captured(arch, params, data):
    """Hidden states [l, b, s, d] and validity [b, s] per tower, in file order."""
    groups = arrange(np.zeros(len(data), int), len(data))
    (batch,) = batches(data, groups, 1, one_device())
    order = groups.slots[0]
    _, towers = jax.jit(lambda p, b: family_of(arch).forward(build(arch), p, b.inputs, gates=Gates(), capture=True))(
        params, batch
    )
    inverse = np.argsort(order)
    return {n: (np.asarray(t.states)[:, inverse], np.asarray(t.valid)[inverse]) for n, t in towers.items()}


@pytest.fixture(scope="module", params=["pi0", "pi0_fast"])
def case(request):
    arch = toys.architecture(request.param)
    params, data = toys.params(arch), toys.data(arch, 12)
    return arch, params, data, captured(arch, params, data)


@pytest.fixture(scope="module")
def pi0():
    arch = toys.architecture()
    return arch, toys.params(arch), toys.data(arch, 12)


@pytest.mark.slow
def test_one_group_equals_numpy_on_all_valid_tokens(case):
    arch, params, data, towers = case
    ours = measure(arch, params, one_episode(data), group_size=12)
    for name, tower in ours.items():
        states, valid = towers[name]
        rows = [states[i][valid].astype(np.float64) for i in range(len(states))]
        assert tower.samples == len(rows[0])
        for index, (scale, estimator) in enumerate(VARIANTS):
            scaled = rows if scale == "raw" else [x / np.sqrt((x**2).mean(1, keepdims=True)) for x in rows]
            wanted = reference_cka.cka_matrix(scaled, debiased=estimator == "debiased")
            np.testing.assert_allclose(
                tower.cka[index], wanted, atol=CKA_TOLERANCE, err_msg=f"{name} {scale} {estimator}"
            )


@pytest.mark.slow
def test_cosine_residual_and_mse_equal_numpy(case):
    arch, params, data, towers = case
    ours = measure(arch, params, one_episode(data), group_size=12)
    for name, tower in ours.items():
        states, valid = towers[name]
        a, b = states[1][valid].astype(np.float64), states[3][valid].astype(np.float64)
        norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        cosine = (a * b).sum(1) / norms[0] / norms[1]
        np.testing.assert_allclose(tower.cosine[1, 3], cosine.mean(), atol=1e-5)
        np.testing.assert_allclose(tower.angle[1, 3], (np.arccos(cosine) / np.pi).mean(), atol=1e-5)
        np.testing.assert_allclose(tower.mse[1, 3], ((a - b) ** 2).mean(), rtol=1e-4)
        residual = np.sqrt((((b - a) ** 2).sum(1) / norms[0] ** 2).mean())
        np.testing.assert_allclose(tower.residual[1, 3], residual, rtol=1e-4)


@pytest.mark.slow
def test_result_depends_neither_on_devices_nor_on_batch_size(pi0):
    arch, params, data = pi0
    many = measure(arch, params, data, groups_per_batch=8)
    one = measure(arch, params, data, groups_per_batch=1, mesh=one_device())
    for name in many:
        np.testing.assert_allclose(many[name].cka, one[name].cka, atol=CKA_TOLERANCE)
        np.testing.assert_allclose(many[name].clusters, one[name].clusters, rtol=1e-4)


@pytest.mark.slow
def test_second_pass_does_not_compile_again(pi0):
    arch, params, data = pi0
    measure(arch, params, data)
    step = similarity.statistics_step(arch, Sampling(), 4, make_mesh())
    compiled = step._cache_size()
    measure(arch, params, data)
    assert step._cache_size() == compiled > 0


@pytest.mark.slow
def test_padded_tokens_and_absent_cameras_do_not_count(pi0):
    arch, params, data = pi0
    arrays = {key: value.copy() for key, value in data.arrays.items()}
    arrays["tokenized_prompt"][~arrays["tokenized_prompt_mask"]] = 0
    arrays["image/left_wrist_0_rgb"][~arrays["image_mask/left_wrist_0_rgb"]] = 255
    changed = dataclasses.replace(data, arrays=arrays)
    before, after = measure(arch, params, data), measure(arch, params, changed)
    for name in before:
        np.testing.assert_allclose(after[name].cka, before[name].cka, atol=CKA_TOLERANCE)


@pytest.mark.slow
def test_pooled_rows_equal_numpy(pi0):
    arch, params, data = pi0
    towers = captured(arch, params, data)
    ours = measure(arch, params, data, sampling=Sampling(samples="observations"))
    for name, tower in ours.items():
        states, valid = towers[name]
        weight = valid[None, :, :, None]
        rows = ((states * weight).sum(2) / weight.sum(2)).astype(np.float64)
        np.testing.assert_allclose(
            tower.matrix("raw", "biased"), reference_cka.cka_matrix(rows, debiased=False), atol=1e-4
        )
        assert tower.samples == len(data)


@pytest.mark.slow
def test_tokens_per_observation_is_the_mean_of_single_ckas(pi0):
    arch, params, data = pi0
    towers = captured(arch, params, data)
    ours = measure(arch, params, data, group_size=1, sampling=Sampling(samples="tokens-per-observation"))
    for name, tower in ours.items():
        states, valid = towers[name]
        single = [
            reference_cka.cka_matrix([x[b][valid[b]].astype(np.float64) for x in states], debiased=False)
            for b in range(len(data))
            if valid[b].sum() >= 4
        ]
        np.testing.assert_allclose(tower.matrix("raw", "biased"), np.mean(single, axis=0), atol=1e-4)


def test_last_vlm_state_of_pi0_is_not_evidence(pi0):
    arch, params, data = pi0
    towers = measure(arch, params, data)
    assert towers["vlm"].read.tolist() == [True] * 4 + [False]
    assert np.isnan(towers["vlm"].evidence().similarity[4]).all()
    assert np.isfinite(towers["action"].evidence().similarity).all()


@pytest.mark.slow
def test_fast_reads_every_state():
    arch = toys.architecture("pi0_fast")
    assert measure(arch, toys.params(arch), toys.data(arch))["vlm"].read.all()


@pytest.mark.slow
def test_vision_tower_on_request(pi0):
    arch, params, data = pi0
    tower = measure(arch, params, data, sampling=Sampling(optional=True))["vision"]
    assert tower.cka.shape == (4, 3, 3)
    np.testing.assert_allclose(np.diagonal(tower.cka, axis1=1, axis2=2), 1.0, atol=CKA_TOLERANCE)


def test_subsample_takes_valid_tokens_only():
    valid = np.zeros((3, 50), bool)
    valid[0, ::2], valid[1, :3] = True, True
    chosen, marked = samples_of_group(valid, 10)
    assert marked.sum(axis=1).tolist() == [10, 3, 0]
    assert all(valid[g, i] for g in range(3) for i, ok in zip(chosen[g], marked[g], strict=True) if ok)
    assert all(len(set(np.asarray(row).tolist())) == 10 for row in chosen)


@pytest.mark.parametrize(("kind", "most"), [("pi0", 2048), ("groot_n15", 960)])
def test_how_many_tokens_are_compared_is_the_familys_unless_it_is_said(kind, most):
    architecture = family_cases.architecture(kind)
    assert Sampling().of(architecture) == Sampling(max_samples=most)
    assert Sampling(max_samples=7).of(architecture) == Sampling(max_samples=7)


@pytest.mark.slow
def test_subsampled_cka_is_close_to_the_full_one(pi0):
    arch, params, data = pi0
    data = one_episode(data)
    full = measure(arch, params, data, group_size=12)["vlm"].matrix("raw", "debiased")
    some = measure(arch, params, data, group_size=12, sampling=Sampling(max_samples=60))["vlm"].matrix(
        "raw", "debiased"
    )
    assert 0 < np.nanmax(np.abs(full - some)) < 0.2


def test_massive_channel_is_detected(pi0):
    arch, params, data = pi0
    loud = jax.tree.map(np.copy, params)
    loud["PaliGemma"]["img"]["head"]["kernel"][:, 5] *= 300
    towers = measure(arch, loud, data)
    assert towers["vlm"].massive_states[:2] == [0, 1]
    assert not measure(arch, params, data)["vlm"].massive_states


@pytest.mark.slow
def test_too_few_samples_is_an_error(pi0):
    arch, params, data = pi0
    with pytest.raises(InputError, match="at most 3 valid samples"):
        measure(arch, params, data.take([0, 1, 2]), sampling=Sampling(samples="observations"))


def test_non_finite_states_are_an_error(pi0):
    arch, params, data = pi0
    broken = jax.tree.map(np.copy, params)
    broken["PaliGemma"]["llm"]["layers"]["mlp_1"]["linear"][1, 0, 0] = np.nan
    with pytest.raises(InputError, match="is not finite after block"):
        measure(arch, broken, data)

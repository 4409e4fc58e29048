"""ProgVI: a fit finds what it should, can be stopped, goes on bit for bit, and says what is wrong."""

import json

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from scipy import stats  # noqa: E402

from locum.errors import UserError  # noqa: E402
from locum.infer import vi, vi_fit  # noqa: E402
from locum.infer.vi_programs import (  # noqa: E402
    air_guide,
    air_images,
    air_model,
    air_start,
    conjugate_guide,
    conjugate_model,
)
from locum.method import to_dict  # noqa: E402

START, DATA = (0.0, 1.0), {"x": 1.3}


def fit(method, params=START, data=DATA, **kwargs):
    return method.fit(conjugate_model, conjugate_guide, params, data, progress=False, **kwargs)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def result():
    return fit(vi.ProgVI(steps=600, optimizer="adam", learning_rate=0.01))


def test_the_posterior_of_a_conjugate_normal(result):
    params, objective, error = result.estimate
    assert [float(p) for p in params] == pytest.approx([0.65, 0.5**0.5], abs=0.04)
    assert objective == pytest.approx(stats.norm(0, 2**0.5).logpdf(1.3), abs=4 * error + 3e-3)
    assert result.trace.shape == (600,)
    assert result.cost.counts["steps"] == 600
    assert result.cost.counts["samples"] == 600 * 64
    assert result.cost.seconds > 0
    assert not result.interrupted


def test_its_certificate_and_what_it_is_compared_with(result):
    check = result.check(samples=5000)
    assert check.passed
    assert "agrees with finite differences" in check.text
    known = result.baselines()
    own, scored = known["as written"], known["Reinforce at every site"]
    assert own["gradient_sd"] < scored["gradient_sd"] * 2
    assert own["value"] == pytest.approx(scored["value"], abs=0.05)
    assert known["at the start"]["value"] < own["value"]


def test_it_is_plain_data_and_a_file(result, tmp_path):
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["method"] == to_dict(result.method)
    assert plain["params"]["params[0]"] == float(result.params[0])
    assert len(plain["trace"]) == 600
    result.save(tmp_path / "fit.safetensors")
    again = vi.VIResult.load(tmp_path / "fit.safetensors", conjugate_model, conjugate_guide, START, DATA)
    assert again.method == result.method
    assert same(again.params, result.params)
    assert np.array_equal(again.trace, result.trace)
    assert again.cost.seconds == result.cost.seconds
    assert again.estimate.objective == result.estimate.objective


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    method, path = vi.ProgVI(steps=60, optimizer="adam", learning_rate=0.01), tmp_path / "run.safetensors"
    whole = fit(method)
    advance, calls = vi_fit._advance, 0

    def stopped(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(vi_fit, "_advance", stopped)
    part = fit(method, checkpoint=path)
    monkeypatch.undo()
    assert part.interrupted
    assert 0 < len(part.trace) < 60
    assert not same(part.params, whole.params)
    rest = fit(method, checkpoint=path)
    assert not rest.interrupted
    assert same(rest.params, whole.params)
    assert np.array_equal(rest.trace, whole.trace)
    assert rest.cost.counts["steps"] == 60
    longer = fit(vi.ProgVI(steps=61, optimizer="adam", learning_rate=0.01), checkpoint=path)
    assert np.array_equal(longer.trace[:60], whole.trace)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    fit(vi.ProgVI(steps=5), checkpoint=path)
    for said, call in {
        "is of a fit with samples 64, not 32": lambda: fit(vi.ProgVI(steps=5, samples=32), checkpoint=path),
        "is of a fit with other starting": lambda: fit(vi.ProgVI(steps=5), (0.1, 1.0), checkpoint=path),
        "is of a fit with other .*data": lambda: fit(vi.ProgVI(steps=5), data={"x": 1.0}, checkpoint=path),
        r"is 5 steps on, ProgVI\.steps is 4": lambda: fit(vi.ProgVI(steps=4), checkpoint=path),
    }.items():
        with pytest.raises(UserError, match=said):
            call()
    other = tmp_path / "other.safetensors"
    save_file(load_file(path), other)  # tensors without the text
    for broken in (other, tmp_path / "text.safetensors"):
        (tmp_path / "text.safetensors").write_text("no tensors")
        with pytest.raises(UserError, match="is no checkpoint of a fit"):
            fit(vi.ProgVI(steps=5), checkpoint=broken)
    with pytest.raises(UserError, match="there is no checkpoint"):
        vi.VIResult.load(tmp_path / "nothing", conjugate_model, conjugate_guide, START, DATA)


def test_what_is_not_finite_is_named_with_its_step(tmp_path):
    """A learning rate too high drives the scale below 0 at once; the log of it is no number."""
    path = tmp_path / "run.safetensors"
    with pytest.raises(UserError, match="the objective is not finite at step 1: lower learning_rate"):
        fit(vi.ProgVI(steps=50, learning_rate=5.0), checkpoint=path)
    assert load_file(path)["trace"].shape == (1,)  # what was well is kept

    def guide(sample, params):
        z = sample("z", vi.normal_reparam(params["m"], 1.0))
        sample("w", vi.normal_reparam(jnp.sqrt(params["w"]) + z, 1.0))  # the root's slope at 0 has no bound

    def model(sample, params):
        conjugate_model(sample, params)
        sample("w", vi.normal(0.0, 1.0))

    with pytest.raises(UserError, match=r"the gradient of params\['w'\] is not finite at step 0: lower"):
        vi.ProgVI(steps=5).fit(model, guide, {"m": 0.0, "w": 0.0}, DATA, progress=False)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ((0, 1.0), r"params\[0\] must be a floating-point number or array \(write 1\.0 for 1\), got 0"),
        ({"a": jnp.arange(2)}, r"params\['a'\] must be a floating-point"),
        ({"a": "x"}, r"params\['a'\] must be a floating-point number or array .*, got 'x'"),
        ((float("nan"), 1.0), r"params\[0\] must be finite, got nan"),
        ((), r"params must hold at least one number or array, got \(\)"),
    ],
)
def test_bad_parameters_are_named(params, said):
    with pytest.raises(UserError, match=said):
        fit(vi.ProgVI(steps=5), params)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("samples", 0),
        ("optimizer", "lbfgs"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("seed", -1),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(UserError, match=rf"^ProgVI\.{field} must be .*, got {value!r}$"):
        vi.ProgVI(**{field: value})


def test_progress_is_told(capsys):
    vi.ProgVI(steps=20).fit(conjugate_model, conjugate_guide, START, DATA)
    assert "fit ELBO: 20/20" in capsys.readouterr().err


def test_two_objects_on_a_canvas():
    """Presence by the score, places reparameterised, a minibatch of images at each step."""
    images = air_images(jax.random.key(0), 64)
    method = vi.ProgVI(vi.PerDatum(), steps=80, samples=16, optimizer="adam", learning_rate=1e-2)
    start = air_start(jax.random.key(1))
    found = method.fit(
        air_model, air_guide(vi.flip_reinforce), start, {"image": images}, args=(images,), progress=False
    )
    assert images.shape == (64, 8, 8)
    assert found.trace[-20:].mean() > found.trace[:20].mean() + 5
    value, error = found.value(draws=2000)
    assert value == pytest.approx(found.trace[-50:].mean(), abs=4)
    assert error < 0.5

"""``bittern quantize``: the work, its order, and what is left when it fails."""

import pytest


@pytest.fixture
def quantize(toy_bittern, tmp_path):
    """Quantize a toy model into ``out``."""

    def call(*args, model="toy:x", recipe="int8", output=None):
        output = output or tmp_path / "out"
        return toy_bittern("quantize", model, "--recipe", recipe, "--output", output, *args)

    return call


def left(tmp_path):
    """Return what lies in the directory besides the tests' own inputs."""
    return sorted(p.name for p in tmp_path.iterdir() if p.suffix not in (".py", ".pt-toy"))


# --- done ---


def test_writes_a_verified_checkpoint_and_shows_everything(quantize, data, tmp_path):
    done = quantize("--data", data(20), "--eval", data(9))
    assert done.code == 0, done.err
    assert done.err == ""
    assert (tmp_path / "out" / "bittern.json").is_file()
    for text in (
        "int8: 2 modules quantized",
        "left as it is",
        "smaller",
        "calibrated on 3 batches",
        "perplexity",
        "unquantized",
        "wrote ",
        "verified by safetensors",
    ):
        assert text in done.out


def test_json_is_the_report(quantize, data):
    done = quantize("--data", data(20), "--eval", data(9), "--batch-size", 4, "--json")
    assert done.code == 0
    assert done.err == ""
    report = done.json
    assert report["recipe"] == "int8"
    assert report["calibration"]["batches"] == 5
    assert report["evaluation"]["samples"] == 9
    assert report["evaluation"]["reference_perplexity"] > 1
    assert report["export"]["format"] == "safetensors"
    assert report["verification"]["ok"] is True
    assert "error" not in report


def test_experts_without_tokens_are_refused_before_the_evaluation(quantize, data, tmp_path):
    done = quantize("--data", data(20), "--eval", data(9), model="toy:experts")
    assert done.code == 2
    assert "2 quantizers saw no data: experts.0.input, experts.2.input" in done.err
    assert "--allow-uncalibrated" in done.err
    assert "perplexity" not in done.out
    assert left(tmp_path) == []


def test_experts_without_tokens_can_borrow_ranges(quantize, data):
    report = quantize(
        "--data", data(20), "--allow-uncalibrated", "--json", model="toy:experts"
    ).json
    unseen = ["experts.0.input", "experts.2.input"]
    assert report["calibration"]["uncalibrated"] == unseen
    assert report["calibration"]["borrowed"] == unseen
    assert report["verification"]["ok"] is True


def test_samples_are_128_for_calibration_and_all_for_evaluation(quantize, data):
    report = quantize("--data", data(200), "--eval", data(150), "--json").json
    assert report["calibration"]["batches"] == 16  # 128 rows in eights
    assert report["evaluation"]["samples"] == 150


def test_data_options_arrive(quantize, data):
    args = ("--samples", 6, "--seq-len", 5, "--batch-size", 3)
    report = quantize("--data", data(20), "--eval", data(4), *args, "--json").json
    assert report["calibration"]["batches"] == 2
    assert report["evaluation"]["tokens"] == 4 * 4


def test_a_recipe_without_static_activations_needs_no_data(quantize):
    done = quantize(recipe="int8-weight-only")
    assert done.code == 0
    assert "calibrated on" not in done.out


def test_overrides_change_the_recipe(quantize):
    args = ("-o", "rules.0.weight.granularity=tensor", "-o", "name=mine", "--json")
    report = quantize(*args, recipe="int8-weight-only").json
    assert report["recipe"] == "mine"
    assert {e["granularity"] for e in report["entries"]} == {"tensor"}


def test_an_empty_directory_is_fine(quantize, tmp_path):
    (tmp_path / "out").mkdir()
    assert quantize(recipe="int8-weight-only").code == 0


def test_no_verify_says_so(quantize, tmp_path):
    done = quantize("--format", "clientless", "--no-verify", recipe="int8-weight-only")
    assert done.code == 0
    assert "not verified" in done.out
    assert (tmp_path / "out").is_dir()
    report = quantize(
        "--no-verify", "--json", recipe="int8-weight-only", output=tmp_path / "two"
    ).json
    assert report["verification"] is None


# --- mistakes surface before work ---


def test_output_is_checked_before_the_model_is_loaded(quantize, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    done = quantize("--json", model="toy:never")
    assert done.code == 2
    assert done.json["error"] == "OutputError"
    assert "not empty" in done.json["what"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (("--recipe", "int88"), "'int8'"),
        (("-o", "rules.0.wieght=int8"), "'weight'"),
        (("-o", "strikt=false"), "'strict'"),
        (("--data", "no-such.txt"), "check the path"),
        (("--eval", "no-such.jsonl"), "check the path"),
    ],
)
def test_bad_arguments_are_found_before_the_model_is_loaded(quantize, tmp_path, args, near):
    done = quantize(*args, "--json", model="toy:never")
    assert done.code == 2
    assert near in done.json["hint"]
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "case",
    [
        (("--format", "safetensor"), "ExportError", "'safetensors'"),
        (("--format", "refused"), "ExportError", "another recipe"),
        (("--format", "clientless"), "VerificationError", "--no-verify"),
        (("-o", "rules.0.match=3.wieght"), "RecipeError", "closest names"),
        (("-o", "rules.0.match.class=Linaer"), "RecipeError", "Linear"),
        (("-o", "rules.0.weight=nvpf4"), "RecipeError", "'nvfp4'"),
        (("-o", "algorithm=maxx"), "CalibrationError", "'max'"),
        ((), "CalibrationError", "--data"),
    ],
)
def test_plan_format_and_data_are_checked_before_the_model_is_converted(
    quantize, tmp_path, monkeypatch, case
):
    from bittern.toolkit import Toolkit

    args, error, near = case
    monkeypatch.setattr(Toolkit, "convert", lambda *_: pytest.fail("converted"))
    done = quantize(*args, "--json")
    assert done.code == 2
    assert done.json["error"] == error
    assert near in done.json["hint"]
    assert left(tmp_path) == []


def test_data_that_nobody_reads(quantize, tmp_path):
    done = quantize("--data", tmp_path / "x.unknown", "--json")
    assert done.code == 2
    assert done.json["error"] == "DataError"


def test_model_that_nobody_loads(quantize):
    done = quantize("--json", model="elsewhere/model")
    assert done.code == 2
    assert done.json["error"] == "ModelError"


@pytest.mark.parametrize(
    "args", [("--samples", 0), ("--seq-len", "x"), ("--batch-size", -1), ("--dtype", "int3")]
)
def test_impossible_numbers_are_usage_errors(quantize, args):
    assert quantize(*args, model="toy:never").code == 2


# --- what is left ---


@pytest.mark.parametrize("when", ["interrupt", "interrupt-later"])
def test_ctrl_c_while_data_is_read_leaves_nothing(quantize, data, tmp_path, when):
    done = quantize("--data", data(when), "--json")
    assert done.code == 130
    assert done.json["what"] == "interrupted; nothing was written"
    assert "Traceback" not in done.err
    assert left(tmp_path) == []


def test_ctrl_c_while_writing_leaves_nothing(quantize, tmp_path):
    done = quantize("--format", "stop", recipe="int8-weight-only")
    assert done.code == 130
    assert "interrupted; nothing was written" in done.err
    assert left(tmp_path) == []


def test_ctrl_c_while_verifying_says_what_is_there(quantize, tmp_path):
    done = quantize("--format", "hangs", recipe="int8-weight-only")
    assert done.code == 130
    assert "out is written, but not verified" in done.err
    assert (tmp_path / "out" / "bittern.json").is_file()


def test_full_disk_leaves_nothing(quantize, tmp_path):
    done = quantize("--format", "full", "--json", recipe="int8-weight-only")
    assert done.code == 2
    assert done.json["error"] == "OutputError"
    assert done.json["what"] == "the disk is full"
    assert left(tmp_path) == []


def test_failed_verification_shows_all_findings_and_keeps_the_directory(quantize, tmp_path):
    done = quantize("--format", "wrong", recipe="int8-weight-only")
    assert done.code == 2
    for i in range(3):
        assert f"layer.{i}: is wrong" in done.out
    assert "NOT verified" in done.out
    assert "not verified: 3 findings" in done.err
    assert (tmp_path / "out" / "bittern.json").is_file()


def test_failed_verification_is_one_json_object_with_report_and_error(quantize):
    done = quantize("--format", "wrong", "--json", recipe="int8-weight-only")
    assert done.code == 2
    assert done.json["error"] == "VerificationError"
    assert done.json["verification"]["ok"] is False
    assert len(done.json["verification"]["findings"]) == 3
    assert done.json["export"]["tensors"] > 0

"""``bittern plan``."""


def test_shows_who_is_quantized_how_and_what_is_left(toy_bittern):
    done = toy_bittern("plan", "toy:x", "--recipe", "int8")
    assert done.code == 0
    assert done.err == ""
    assert "int8: 2 modules quantized" in done.out
    assert "weight: int8/channel" in done.out
    assert "no recipe rule names it" in done.out
    assert "needs calibration data" in done.out


def test_json(toy_bittern):
    found = toy_bittern("plan", "toy:x", "-r", "int8", "--json").json
    assert {e["module"] for e in found["entries"]} == {"1", "3"}
    assert found["skipped"] == {"0": "no recipe rule names it"}
    assert found["needs_data"] is True
    assert found["algorithm"] == [{"name": "max", "options": {}}]
    assert found["bytes_after"] < found["bytes_before"]
    assert "export" not in found


def test_overrides(toy_bittern):
    args = ("plan", "toy:x", "-r", "int8", "-o", "rules.0.input=none", "--json")
    found = toy_bittern(*args).json
    assert found["needs_data"] is False


def test_recipe_is_checked_before_the_model_is_loaded(toy_bittern):
    assert toy_bittern("plan", "toy:never", "-r", "intt8", "--json").json["error"] == "RecipeError"


def test_tables_are_not_folded_in_a_pipe(toy_bittern, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    toy_lines = toy_bittern("plan", "toy:x", "-r", "int8").out.splitlines()
    assert any(len(line) > 80 for line in toy_lines)

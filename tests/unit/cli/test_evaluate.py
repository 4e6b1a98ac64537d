"""``bittern eval``."""


def test_shows_perplexity_on_all_rows(toy_bittern, data):
    done = toy_bittern("eval", "toy:x", "--data", data(150))
    assert done.code == 0
    assert done.err == ""
    assert "perplexity" in done.out
    assert "150" in done.out


def test_json_and_options(toy_bittern, data):
    args = ("--samples", 7, "--seq-len", 5, "--batch-size", 2, "--json")
    found = toy_bittern("eval", "toy:x", "--data", data(20), *args).json
    assert found["samples"] == 7
    assert found["tokens"] == 7 * 4
    assert found["perplexity"] > 1
    assert found["reference_perplexity"] is None


def test_missing_file_is_found_before_the_model_is_loaded(toy_bittern):
    done = toy_bittern("eval", "toy:never", "--data", "no-such.txt", "--json")
    assert done.code == 2
    assert done.json["error"] == "DataError"


def test_data_is_required(toy_bittern):
    assert toy_bittern("eval", "toy:x").code == 2

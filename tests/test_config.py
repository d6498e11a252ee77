import pytest
import yaml

from qvl_batch.config import commented_yaml, load_config, parse_config
from qvl_batch.errors import ConfigError

NEEDED = {"input": {"manifest": "m"}, "output": {"root": "o"}, "model": {"path": "p"}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("recipe.dimm=3", ["recipe.dimm", "recipe.dim?"]),
        ("recpie.dim=3", ["recpie", "recipe"]),
        ("commit.interval=3", ["commit.interval", "commit.interval_s"]),
        ("output.manifest=x", ["output.manifest", "input.manifest"]),
        ("recipe.dim=abc", ["recipe.dim", "'abc'", "integer"]),
        ("recipe.dim='64'", ["recipe.dim", "'64'"]),
        ("recipe.dim=12", ["recipe.dim", "12", "multiple of 8"]),
        ("recipe.encodings=[float16,float32]", ["recipe.encodings", "not both"]),
        ("recipe.encodings=[]", ["recipe.encodings", "float32, float16, int8, binary"]),
        ("recipe.encodings=[int4]", ["recipe.encodings", "int4", "'float16'"]),
        ("recipe.image.max_px=10", ["recipe.image.max_px", "10", "4096"]),
        ("recipe.video.fps=0", ["recipe.video.fps", "above 0"]),
        ("recipe.max_tokens=40000", ["recipe.max_tokens", "32768"]),
        ("limits.max_failure_rate=1.5", ["limits.max_failure_rate", "1.5", "1"]),
        ("output.mode=merge", ["output.mode", "'merge'", "'append'"]),
        ("pools.embed=3", ["pools.embed", "section"]),
        ("storage.endpoint_url=localhost", ["storage.endpoint_url", "http://"]),
        ("storage.endpoint_url=http://k:s@h", ["credential"]),
        ("input.limit=0", ["input.limit", "0"]),
        ("nothing", ["--set", "a.b=value"]),
        ("a..b=1", ["a.b=value"]),
    ],
)
def test_nonsense_is_refused_with_key_value_and_what_is_allowed(override, expected):
    with pytest.raises(ConfigError) as caught:
        parse_config(NEEDED, [override])
    for part in expected:
        assert part in str(caught.value)


def test_missing_keys_are_all_named():
    with pytest.raises(ConfigError) as caught:
        parse_config({"input": {}, "output": {"root": "o"}})
    assert "input.manifest" in str(caught.value)
    assert "model" in str(caught.value)


def test_overrides_win_and_keep_their_types():
    config = parse_config(
        NEEDED, ["recipe.dim=64", "recipe.encodings=[float16]", "commit.interval_s=5"]
    )
    assert config.recipe.dim == 64
    assert config.recipe.encodings == ["float16"]
    assert config.commit.interval_s == 5.0


def test_the_written_configuration_is_the_default_one(tmp_path):
    path = tmp_path / "embed.yaml"
    path.write_text(commented_yaml(NEEDED))
    assert load_config(str(path)) == parse_config(NEEDED)
    assert yaml.safe_load(path.read_text())["recipe"]["encodings"] == ["binary", "int8"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a: [1\n", "line 2"), ("just text\n", "no sections"), ("", "no sections")],
)
def test_a_file_that_is_no_configuration(tmp_path, content, expected):
    path = tmp_path / "embed.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load_config(str(path))


def test_a_missing_file_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(ConfigError, match="qvl-batch init"):
        load_config(str(tmp_path / "absent.yaml"))


def test_a_dimension_above_the_models_names_both():
    config = parse_config(NEEDED, ["recipe.dim=256"])
    with pytest.raises(ConfigError, match=r"256.*128"):
        config.build_recipe("digest", model_dim=128)

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cogvx_fast.cli import validate
from cogvx_fast.cli.checkpoint import Checkpoint, read_checkpoint
from cogvx_fast.cli.console import UsageError
from cogvx_fast.family import Variant

COGVIDEOX_2B = Variant()
COGVIDEOX_5B = Variant(use_rotary_positional_embeddings=True)
COGVIDEOX_15 = Variant(
    use_rotary_positional_embeddings=True, patch_size_t=2, sample_frames=81, sample_height=300, sample_width=300
)
LEARNED = Variant(use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True)


def test_the_checkpoint_gives_the_defaults():
    assert validate.num_frames(None, COGVIDEOX_15) == 81
    assert validate.video_size(None, None, COGVIDEOX_2B) == (480, 720)
    assert Checkpoint("2b").native_dtype == "float16"
    assert Checkpoint("5b", variant=COGVIDEOX_5B).native_dtype == "bfloat16"
    assert Checkpoint("2b", stored_dtype="bfloat16").native_dtype == "bfloat16"
    assert Checkpoint("2b", stored_dtype="float32").native_dtype == "float16"


@pytest.mark.parametrize(
    ("variant", "frames"),
    [
        (COGVIDEOX_2B, 1),
        (COGVIDEOX_2B, 9),
        (COGVIDEOX_2B, 57),
        (COGVIDEOX_15, 17),
        (COGVIDEOX_15, 161),
        (Variant(sample_frames=14), 14),
        (LEARNED, 49),
    ],
)
def test_frame_counts_that_work(variant, frames):
    assert validate.num_frames(frames, variant) == frames


@pytest.mark.parametrize(
    ("variant", "frames", "nearest"),
    [
        (COGVIDEOX_2B, 48, "41 or 49"),
        (COGVIDEOX_2B, 50, "49 or 57"),
        (COGVIDEOX_2B, 13, "9 or 17"),
        (COGVIDEOX_2B, 2, "1 or 9"),
        (COGVIDEOX_2B, 0, "1"),
        (COGVIDEOX_2B, -8, "1"),
        (COGVIDEOX_15, 49 + 8, "49 or 65"),
    ],
)
def test_other_frame_counts_name_the_nearest(variant, frames, nearest):
    with pytest.raises(UsageError, match=rf"^--frames {frames}: must be (8|16)N\+1 .*nearest: {nearest}$"):
        validate.num_frames(frames, variant)


def test_learned_positions_allow_their_own_size_only():
    assert validate.video_size(480, None, LEARNED) == (480, 720)
    with pytest.raises(UsageError, match=r"^--width 736: must be 720"):
        validate.video_size(480, 736, LEARNED)
    with pytest.raises(UsageError, match=r"^--frames 57: must be 49"):
        validate.num_frames(57, LEARNED)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (100, None, "--height 100: must be a multiple of 16; nearest: 96 or 112"),
        (None, 728, "--width 728: must be a multiple of 16; nearest: 720 or 736"),
        (0, None, "--height 0: must be a multiple of 16; nearest: 16"),
        (None, -16, "--width -16: must be a multiple of 16; nearest: 16"),
    ],
)
def test_sizes_must_fit_the_patches(height, width, message):
    with pytest.raises(UsageError) as caught:
        validate.video_size(height, width, COGVIDEOX_2B)
    assert str(caught.value) == message
    assert validate.video_size(96, 112, COGVIDEOX_2B) == (96, 112)


def test_the_patch_size_sets_the_multiple():
    assert validate.video_size(24, 24, Variant(patch_size=1)) == (24, 24)
    with pytest.raises(UsageError, match="multiple of 32"):
        validate.video_size(48, None, Variant(patch_size=4))


def test_sliced_position_tables_have_an_end():
    assert validate.video_size(2400, 2400, COGVIDEOX_15) == (2400, 2400)
    with pytest.raises(UsageError, match=r"^--height 2416: must be at most 2400"):
        validate.video_size(2416, None, COGVIDEOX_15)
    assert validate.video_size(2416, None, COGVIDEOX_5B) == (2416, 720)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"steps": 0}, "--steps 0: must be 1 to 1000"),
        ({"steps": 1001}, "--steps 1001: must be 1 to 1000"),
        ({"guidance": 0.5}, "--guidance 0.5: must be 1 .* to 30"),
        ({"guidance": float("nan")}, "--guidance nan"),
        ({"guidance": 31}, "--guidance 31"),
        ({"seed": -1}, "--seed -1: must be 0 to"),
        ({"seed": 2**63}, "--seed"),
        ({"zoom": 0}, "--zoom 0: must be 1 to 16"),
        ({"zoom": 17}, "--zoom 17"),
        ({"guidance": 1.0, "negative": "dark"}, "--negative 'dark': has no effect"),
    ],
)
def test_numbers_out_of_range(numbers, message):
    good = {"steps": 50, "guidance": 6.0, "negative": None, "seed": 0, "zoom": 1, "checkpoint": Checkpoint("2b")}
    validate.check_numbers(**good)
    with pytest.raises(UsageError, match=message):
        validate.check_numbers(**{**good, **numbers})


def test_prompts_come_from_one_place(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert validate.read_prompts(None, path) == ["a cat", "a dog"]
    assert validate.read_prompts("a cat", None) == ["a cat"]
    with pytest.raises(UsageError, match=r"prompts\.txt.*not both"):
        validate.read_prompts("a cat", path)
    with pytest.raises(UsageError, match="PROMPT: is missing"):
        validate.read_prompts(None, None)
    with pytest.raises(UsageError, match="PROMPT '  ': is empty"):
        validate.read_prompts("  ", None)
    path.write_text("\n \n")
    with pytest.raises(UsageError, match=r"--prompt-file .*prompts\.txt.* is empty"):
        validate.read_prompts(None, path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not text"):
        validate.read_prompts(None, path)
    with pytest.raises(UsageError, match=r"none\.txt.*cannot be read \(No such file"):
        validate.read_prompts(None, tmp_path / "none.txt")


def test_a_byte_order_mark_is_none_of_the_first_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    assert validate.read_prompts(None, path) == ["a cat", "a dog"]
    for nothing in (b"\xef\xbb\xbf", b"\xef\xbb\xbf\n \n", "\u200b\n\ufeff\n\0\n".encode()):
        path.write_bytes(nothing)
        with pytest.raises(UsageError, match=r"--prompt-file .*prompts\.txt.* is empty"):
            validate.read_prompts(None, path)
    with pytest.raises(UsageError, match=r"PROMPT '\\ufeff': is empty"):
        validate.read_prompts("\ufeff", None)


def test_a_prompt_is_read_as_utf_8_whatever_the_locale():
    as_in_ascii = "ein Kätzchen".encode().decode("ascii", "surrogateescape")
    assert validate.read_prompts(as_in_ascii, None) == ["ein Kätzchen"]
    for broken in ("a cat\udcff", "a cat\ud800"):
        with pytest.raises(UsageError, match=r"PROMPT 'a cat\\ud\w+': is not text in UTF-8"):
            validate.read_prompts(broken, None)


@pytest.mark.parametrize("output", ["", ".", "/", "..", "new/.."])
@pytest.mark.parametrize("number", [1, 2])
def test_an_output_without_a_name_is_refused(output, number):
    with pytest.raises(UsageError, match=r"--output: '.*': ends in no name; name a file, or a new folder"):
        validate.output_paths(Path(output), number)


def test_several_prompts_get_numbered_names():
    assert validate.output_paths(Path("a/out.mp4"), 1) == [Path("a/out.mp4")]
    assert validate.output_paths(Path("a/out.mp4"), 2) == [Path("a/out-1.mp4"), Path("a/out-2.mp4")]
    assert validate.output_paths(Path("frames"), 2) == [Path("frames-1"), Path("frames-2")]
    numbered = validate.output_paths(Path("out.gif"), 10)
    assert (numbered[0], numbered[9]) == (Path("out-01.gif"), Path("out-10.gif"))


def test_places_name_their_argument(tmp_path):
    with pytest.raises(UsageError, match=r"^--output: .*out\.avi"):
        validate.check_places([tmp_path / "out.mp4", tmp_path / "out.avi"], None, 8)
    with pytest.raises(UsageError, match=r"^--sheet: .*sheet\.gif"):
        validate.check_places([tmp_path / "out.mp4"], tmp_path / "sheet.gif", 8)
    with pytest.raises(UsageError, match=r"^--fps 0: must be 1 to 120"):
        validate.check_places([tmp_path / "out.mp4"], None, 0)
    with pytest.raises(UsageError, match=r"^--fps 60: must be 1 to 50 for .*out\.gif"):
        validate.check_places([tmp_path / "out.gif"], None, 60)
    with pytest.raises(UsageError, match=r"^--fps 8: has no effect on a folder"):
        validate.check_places([tmp_path / "frames"], None, 8)
    validate.check_places([tmp_path / "out.mp4"], tmp_path / "sheet.png", None)


def test_no_file_lies_in_another(tmp_path):
    out = tmp_path / "out.mp4"
    with pytest.raises(UsageError, match=r"^--sheet .*sheet\.png' would lie in .*out\.mp4', a file"):
        validate.check_places([out], out / "sheet.png", None)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"^--sheet .*sheet\.png' would lie in .*out\.mp4', a file"):
        validate.check_places([out], tmp_path / "link" / "out.mp4" / "deep" / "sheet.png", None)
    with pytest.raises(UsageError, match=r"^--sheet .*out\.mp4' would lie in .*sheet\.png', a file"):
        validate.check_places([tmp_path / "sheet.png" / "out.mp4"], tmp_path / "sheet.png", None)
    validate.check_places([tmp_path / "frames"], tmp_path / "frames" / "sheet.png", None)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_checkpoints_for_images_name_their_class():
    validate.check_text_only(Checkpoint("2b"))
    image = Checkpoint("i2v", pipeline_class="CogVideoXImageToVideoPipeline", variant=Variant(in_channels=32))
    with pytest.raises(UsageError, match=r"from text alone.*FastCogVideoXImageToVideoPipeline"):
        validate.check_text_only(image)
    control = Checkpoint("fun", pipeline_class="CogVideoXFunControlPipeline", variant=Variant(in_channels=32))
    with pytest.raises(UsageError, match=r"from text alone.*FastCogVideoXFunControlPipeline"):
        validate.check_text_only(control)


def test_a_checkpoint_is_read_from_its_json_files(configuration):
    folder = configuration(
        scheduler={"num_train_timesteps": 500}, sample_frames=81, patch_size_t=2, attention_bias=True
    )
    checkpoint = read_checkpoint(str(folder))
    variant = Variant(sample_frames=81, patch_size_t=2)
    assert checkpoint == Checkpoint(str(folder), num_train_timesteps=500, variant=variant)


def test_the_stored_dtype_is_read_from_the_header(checkpoint, configuration):
    assert read_checkpoint(str(checkpoint)).stored_dtype == "float32"
    folder = configuration()
    assert read_checkpoint(str(folder)).stored_dtype is None
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    one, two, three = np.zeros(2, np.float32), np.zeros(2, np.float16), np.zeros(1, np.float16)
    save_file({"a": one, "b": two, "c": three}, weights, {"format": "pt"})
    assert read_checkpoint(str(folder)).stored_dtype == "float16"
    weights.write_bytes(b"\xff" * 64)
    assert read_checkpoint(str(folder)).stored_dtype is None


def test_what_is_no_cogvideox_is_refused(configuration, tmp_path):
    with pytest.raises(UsageError, match="StableDiffusionPipeline; must be a CogVideoX"):
        read_checkpoint(str(configuration("sd", pipeline_class="StableDiffusionPipeline")))
    with pytest.raises(UsageError, match="SD3Transformer2DModel; must be a CogVideoXTransformer3DModel"):
        read_checkpoint(str(configuration("mixed", _class_name="SD3Transformer2DModel")))
    folder = configuration("broken")
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"transformer/config\.json cannot be read"):
        read_checkpoint(str(folder))
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no transformer/config\.json"):
        read_checkpoint(str(folder))
    with pytest.raises(UsageError, match=r"has no model_index\.json"):
        read_checkpoint(str(tmp_path))
    with pytest.raises(UsageError, match="is a file"):
        read_checkpoint(__file__)
    for missing in ("none", "./none/here", "/none/here", "a/b/c"):
        with pytest.raises(UsageError, match=f"--model '{missing}': no such folder"):
            read_checkpoint(missing)


@pytest.mark.parametrize("value", ["x", [], {}, 0, -1, 10**309, 1.5, True])
def test_configurations_of_another_kind_are_named(value, configuration):
    for key in ("num_layers", "patch_size", "patch_size_t", "sample_frames", "use_rotary_positional_embeddings"):
        if key.startswith("use") and value is True:
            continue
        with pytest.raises(UsageError, match=rf"--model .*: its transformer/config.json has {key}=.*; must be .*"):
            read_checkpoint(str(configuration(**{key: value})))
    with pytest.raises(UsageError, match=r"scheduler_config.json has num_train_timesteps=.*; must be a whole number"):
        read_checkpoint(str(configuration(scheduler={"num_train_timesteps": value})))


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"a":' + b"1" * 5000 + b"}", b"\xff", b"[]"])
def test_a_configuration_that_cannot_be_read_is_named(content, configuration):
    folder = configuration()
    (folder / "transformer" / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"--model .*: its transformer/config.json cannot be read \("):
        read_checkpoint(str(folder))


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"{}", b'{"a": 1}', b'{"a": {}}', b'{"a": {"dtype": []}}', b"[" * 100_000]
)
def test_a_broken_header_says_nothing_of_the_dtype(header, configuration):
    folder = configuration()
    (folder / "transformer" / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_checkpoint(str(folder)).stored_dtype is None
    (folder / "transformer" / "a.safetensors").mkdir()
    assert read_checkpoint(str(folder)).stored_dtype is None


@pytest.mark.parametrize("model", ["x" * 256, "x" * 5000, "~nouser", "~nouser/model", "a\0b", "\udcff"])
def test_names_that_no_file_can_have_are_no_checkpoint(model):
    with pytest.raises(UsageError, match=r"--model '.*': no such folder; must be a checkpoint"):
        read_checkpoint(model)


def test_hub_ids_are_asked_of_the_hub(configuration, monkeypatch):
    folder, asked = configuration(sample_frames=17), []

    def download(repo_id, filename):
        asked.append((repo_id, filename))
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_checkpoint("THUDM/CogVideoX-2b") == Checkpoint("THUDM/CogVideoX-2b", variant=Variant(sample_frames=17))
    assert ("THUDM/CogVideoX-2b", "transformer/config.json") in asked

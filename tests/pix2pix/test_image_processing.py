"""Any kind and size of image goes in, the same size comes out."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_efficient import Pix2PixConfig, Pix2PixImageProcessor


@pytest.fixture
def processor() -> Pix2PixImageProcessor:
    return Pix2PixImageProcessor(size_divisor=8)


def test_pixels_reach_minus_one_and_one_and_come_back(processor, picture):
    image = picture(16, 24)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    black_and_white = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    assert processor(black_and_white, do_pad=False, return_tensors="pt")["pixel_values"].unique().tolist() == [-1, 1]
    assert np.array_equal(processor.post_process_image_to_image(pixels)[0], image)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 8), (8, 8), (9, 3), (31, 17)])
def test_every_size_is_padded_by_reflection_and_comes_back(processor, picture, size):
    image = picture(*size)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert [side % 8 for side in pixels.shape[2:]] == [0, 0]
    assert all(0 <= padded - side < 8 for padded, side in zip(pixels.shape[2:], size))
    if size == (7, 8):
        assert torch.equal(pixels[0, :, 7], pixels[0, :, 5])  # the row below the last repeats the one above it
    assert np.array_equal(processor.post_process_image_to_image(pixels, [size])[0], image)


def test_a_tiny_picture_lies_in_the_middle_of_its_padding(picture):
    processor = Pix2PixImageProcessor(size_divisor=16)  # what a network draws along its border would be all of it
    for height, width in ((1, 1), (2, 3), (6, 20), (20, 6)):
        image = picture(height, width)
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        top, left = ((-side % 16) // 2 if side < 7 else 0 for side in (height, width))
        inside = pixels[:, :, top : top + height, left : left + width].clone()
        torch.testing.assert_close(inside, processor(image, do_pad=False, return_tensors="pt")["pixel_values"])
        pixels[:] = -1
        pixels[:, :, top : top + height, left : left + width] = inside  # nothing else is taken back
        assert np.array_equal(processor.post_process_image_to_image(pixels, [(height, width)])[0], image)


def test_every_kind_of_image_becomes_the_same_pixels(processor, picture):
    rgb = picture(8, 8)
    array = np.asarray(rgb)
    kinds = {
        "array": array,
        "channels first": array.transpose(2, 0, 1),
        "tensor": torch.from_numpy(array.copy()),
        "tensor channels first": torch.from_numpy(array.transpose(2, 0, 1).copy()),
        "int64": array.astype(np.int64),
        "uint16": array.astype(np.uint16) * 257,
        "float": array / 255,
        "opaque": rgb.convert("RGBA"),
    }
    expected = processor(rgb, return_tensors="pt")["pixel_values"]
    for name, image in kinds.items():
        answer = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(answer, expected, atol=1e-6, rtol=0, msg=name)


def test_a_bfloat16_tensor_is_an_image(processor):
    pixels = torch.rand(3, 8, 8).bfloat16()
    answer = processor(pixels, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(answer, pixels.float() * 2 - 1, atol=1e-5, rtol=0)


def test_low_and_narrow_arrays_keep_their_size(processor, picture):
    low, narrow = np.array(picture(2, 30)), np.array(picture(30, 2))
    for array in (low, narrow, np.array(picture(3, 4))):
        height, width = array.shape[:2]
        assert processor.process_image(array).shape == (3, height, width)
        if 3 not in (height, width):  # a tensor of 3 rows may have them first
            assert processor.process_image(torch.from_numpy(array)).shape == (3, height, width)
        channels_first = torch.from_numpy(array.transpose(2, 0, 1).copy())
        assert processor.process_image(channels_first).shape == (3, height, width)
    assert processor.process_image(low.transpose(2, 0, 1), input_data_format="channels_first").shape == (3, 2, 30)


def test_resized_images_are_scaled_back(picture):
    processor = Pix2PixImageProcessor(do_resize=True, size={"height": 24, "width": 20}, size_divisor=16)
    for image in (picture(40, 30), picture(5, 7), np.asarray(picture(40, 30)) / 255):
        height, width = np.asarray(image).shape[:2]
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 32, 32)
        answer = processor.post_process_image_to_image(pixels, [(height, width)])[0]
        assert answer.size == (width, height)
        wanted = np.asarray(image) * (255 if isinstance(image, np.ndarray) else 1)
        assert np.abs(np.asarray(answer, float) - wanted).mean() < 8  # smooth pictures survive both ways


def test_grey_and_deep_images_keep_their_brightness(processor):
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    expected = processor(np.repeat(ramp[..., None], 3, 2), return_tensors="pt")["pixel_values"]
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    kinds = [Image.fromarray(ramp), ramp, ramp[..., None], deep, Image.fromarray(ramp.astype(np.int32) * 257)]
    kinds += [Image.fromarray((ramp / 255).astype(np.float32)), Image.fromarray(ramp).convert("P")]
    for image in kinds:
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)
    dark = Image.fromarray(np.full((8, 8), 200, np.uint16))  # 0.3 % of white, not 78 %
    assert processor.process_image(dark).max() == 1
    bits = processor(Image.fromarray(ramp > 100), return_tensors="pt")["pixel_values"]
    assert bits.unique().tolist() == [-1, 1]


def test_transparent_pixels_are_white(processor):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4, :, 3] = 255  # black above, a transparent lower half
    palette = Image.fromarray(rgba).convert("RGB").quantize(2)
    palette.info["transparency"] = 0
    for image in (
        Image.fromarray(rgba),
        rgba,
        Image.fromarray(rgba).convert("LA"),
        np.ascontiguousarray(rgba[..., 2:]),
    ):
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
        assert pixels[:, :4].unique().tolist() == [-1]
        assert pixels[:, 4:].unique().tolist() == [1]
    assert processor(palette, return_tensors="pt")["pixel_values"].unique().tolist() == [1]


def test_a_rotated_photo_stands_upright(processor, tmp_path, picture):
    image = picture(8, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = processor(Image.open(tmp_path / "turned.png"), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, processor(image.rotate(270, expand=True), return_tensors="pt")["pixel_values"])


def test_a_grey_generator_gets_and_gives_grey(picture):
    config = Pix2PixConfig(num_levels=2, base_channels=2, num_channels=1, image_size=8)
    processor = Pix2PixImageProcessor.for_model(config)
    pixels = processor(picture(8, 8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 8, 8)
    answer = processor.post_process_image_to_image(pixels)[0]
    assert answer.mode == "L"
    assert np.array_equal(answer, picture(8, 8).convert("L"))
    colours = processor.post_process_image_to_image(torch.zeros(2, 3, 8, 8))
    assert [image.mode for image in colours] == ["RGB", "RGB"]


def test_settings_survive_saving(tmp_path):
    Pix2PixImageProcessor(size_divisor=32, do_resize=True, size={"height": 64, "width": 48}).save_pretrained(tmp_path)
    loaded = Pix2PixImageProcessor.from_pretrained(tmp_path)
    assert loaded.size_divisor == 32
    pixels = loaded(np.zeros((10, 10, 3), np.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)


def test_a_wrong_image_is_named(processor, picture):
    with pytest.raises(ValueError, match=r"float image array must hold values in \[0, 1\], got \[0.0, 3.0\]"):
        processor(np.array([[[0.0, 3.0, 1.0]]]))
    with pytest.raises(ValueError, match=r"integer image array must hold values in \[0, 255\], got \[-1, 4\]"):
        processor(np.array([[[-1, 4, 1]]]))
    with pytest.raises(ValueError, match=r"must hold numbers, got uint8 of shape \(0, 8, 3\)"):
        processor(np.zeros((0, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"1 to 4 channels, got the shape \(8, 8, 8\)"):
        processor(np.zeros((8, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"one size after padding, got 16x8, 8x8"):
        processor([picture(8, 8), picture(16, 8)], return_tensors="pt")
    with pytest.raises(ValueError, match=r"one size an image, got 2 for 1"):
        processor.post_process_image_to_image(torch.zeros(1, 3, 8, 8), [(8, 8), (8, 8)])
    with pytest.raises(ValueError, match=r"`size_divisor` must be at least 1 pixel, got 0"):
        Pix2PixImageProcessor(size_divisor=0)

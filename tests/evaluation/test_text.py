import pytest

from t2r.evaluation import read_text


def test_text_comes_without_its_byte_order_mark(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf" + "naïve\r\n".encode())
    assert read_text(path) == "naïve\r\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such text file"),
        (b"", "the text is empty"),
        (b" \n", "the text is empty"),
        (b"caf\xe9 au lait", "not UTF-8, byte 0xe9 at offset 3"),
        (b"\xef\xbb\xbfcaf\xe9", "not UTF-8, byte 0xe9 at offset 6"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        read_text(path)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_text(tmp_path)

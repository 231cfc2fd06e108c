"""Token files: the bytes on disk, and what a file that does not fit its metadata says."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.shards import ShardWriter, Source, TokenFile, token_dtype
from pipeline.errors import ArtifactError


def write(path: Path, vocab_size: int = 400) -> TokenFile:
    with ShardWriter(path, vocab_size, 7, "hash") as shard:
        shard.append([1, 2, 3], 10)
        shard.append(np.array([], dtype=np.uint32), 0)
        shard.append(np.array([258, 9], dtype=np.uint32), 5)
    return TokenFile(path)


def test_the_bytes_are_datatroves(tmp_path: Path) -> None:
    write(tmp_path / "train.ds")
    assert (tmp_path / "train.ds").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 7, 0, 7, 0, 2, 1, 9, 0, 7, 0])
    assert (tmp_path / "train.ds.index").read_bytes() == b"".join(n.to_bytes(8, "little") for n in (4, 5, 8))
    assert (tmp_path / "train.ds.bytes").read_bytes() == b"".join(n.to_bytes(8, "little") for n in (10, 0, 5))
    assert json.loads((tmp_path / "train.ds.metadata").read_text()) == {
        "version": 2,
        "dtype": "uint16",
        "tokens": 8,
        "documents": 3,
        "text_bytes": 15,
        "separator_id": 7,
        "vocab_size": 400,
        "tokenizer_hash": "hash",
        "sources": [{"label": "text", "weight": 1.0, "tokens": 8, "documents": 3, "text_bytes": 15}],
    }


def test_the_documents_of_a_source_stand_together(tmp_path: Path) -> None:
    sources = [Source("books", 2.0), Source("none"), Source("web")]
    with ShardWriter(tmp_path / "train.ds", 400, 7, "hash", sources) as shard:
        for ids, size, source in (([1, 2], 9, 0), ([3], 4, 0), ([4], 5, 2)):
            shard.append(ids, size, source)
        with pytest.raises(AssertionError, match="stand together"):
            shard.append([5], 1, 1)
    file = TokenFile(tmp_path / "train.ds")
    assert file.metadata.sources == (Source("books", 2.0, 5, 2, 13), Source("none"), Source("web", 1.0, 2, 1, 5))
    assert [file.documents_of(source) for source in range(3)] == [range(2), range(2, 2), range(2, 3)]
    assert [file.tokens_of(source) for source in range(3)] == [(0, 5), (5, 5), (5, 7)]
    assert sources[0].tokens == 0  # what was handed in is not written on


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")
    file = write(tmp_path / "train.ds", 70_000)
    assert (tmp_path / "train.ds").stat().st_size == 32
    assert file.tokens.tolist() == [1, 2, 3, 7, 7, 258, 9, 7]


def test_documents_come_back(tmp_path: Path) -> None:
    file = write(tmp_path / "train.ds")
    assert len(file) == 8
    assert [file.document(i).tolist() for i in range(3)] == [[1, 2, 3, 7], [7], [258, 9, 7]]
    assert file.document_bytes.tolist() == [10, 0, 5]
    assert isinstance(file.tokens, np.memmap)


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train.ds", 10, 0, ""):
        pass
    assert len(TokenFile(tmp_path / "train.ds")) == 0


def test_a_writer_that_was_broken_off_leaves_no_metadata(tmp_path: Path) -> None:
    def broken_off() -> None:
        with ShardWriter(tmp_path / "train.ds", 10, 0, "") as shard:
            shard.append([1], 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    with pytest.raises(ArtifactError, match="no readable metadata"):
        TokenFile(tmp_path / "train.ds")


@pytest.mark.parametrize("suffix", ["", ".index", ".bytes"])
def test_a_part_of_another_size_is_refused(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "train.ds")
    part = tmp_path / f"train.ds{suffix}"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes are meant to be there") as caught:
        TokenFile(tmp_path / "train.ds")
    assert caught.value.where == str(part)
    part.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        TokenFile(tmp_path / "train.ds")


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_writer_goes_on_where_it_was_saved_and_takes_whole_files(tmp_path: Path) -> None:
    sources = [Source("books", 2.0), Source("web")]
    documents = [([1, 2], 9, 0), ([], 4, 0), ([4], 5, 1), ([5, 6], 7, 1)]
    for name in ("calm", "saved", "taken"):
        (tmp_path / name).mkdir()
    with ShardWriter(tmp_path / "calm" / "train.ds", 400, 7, "hash", sources) as shard:
        for document in documents:
            shard.append(*document)

    shard = ShardWriter(tmp_path / "saved" / "train.ds", 400, 7, "hash", sources)
    for document in documents[:3]:
        shard.append(*document)
    begun = shard.sync()
    shard.append([9] * 1000, 3, 1)  # and killed
    for file in shard.files:
        file.close()
    with ShardWriter(tmp_path / "saved" / "train.ds", 400, 7, "hash", sources, begun) as shard:
        assert (shard.tokens, shard.documents, shard.text_bytes, shard.last) == (6, 3, 18, 1)
        shard.append(*documents[3])
    assert parts(tmp_path / "saved") == parts(tmp_path / "calm")
    assert begun == [Source("books", 2.0, 4, 2, 13), Source("web", 1.0, 2, 1, 5)]

    with ShardWriter(tmp_path / "taken" / "train.ds", 400, 7, "hash", sources) as whole:
        for number, (source, own) in enumerate([(0, documents[:2]), (0, []), (1, documents[2:])]):
            with ShardWriter(tmp_path / f"{number}.ds", 400, 7, "hash") as shard:
                for ids, size, _ in own:
                    shard.append(ids, size)
            whole.take(TokenFile(tmp_path / f"{number}.ds"), source)
    assert parts(tmp_path / "taken") == parts(tmp_path / "calm")


def test_a_writer_does_not_go_on_behind_what_is_lost(tmp_path: Path) -> None:
    write(tmp_path / "train.ds")
    with pytest.raises(ArtifactError, match="the file has 16 bytes, and 20 were written"):
        ShardWriter(tmp_path / "train.ds", 400, 7, "hash", begun=[Source("text", 1.0, 10, 3, 15)])
    with pytest.raises(ArtifactError, match="the file is missing"):
        ShardWriter(tmp_path / "none.ds", 400, 7, "hash", begun=[Source("text", 1.0, 10, 3, 15)])

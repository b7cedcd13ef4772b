"""Text data sets from the Hugging Face Hub, parquet files or `save_to_disk` folders."""

from __future__ import annotations

from typing import Any

from ablab.data.tables import file_table, hub_table, is_unsplit
from ablab.data.token_stream import Parts, TokenStream


class HFText(TokenStream):
    """The documents of a text column, join_documents by blank lines; empty documents are kept.

    Args:
        name: name of the data set on the Hub, for example "Salesforce/wikitext".
        config: name of its configuration on the Hub, for example "wikitext-2-raw-v1".
        root: a folder with parquet files, `<split>.parquet` or `<split>-….parquet`, or a folder written by
            `datasets.save_to_disk`; None loads from the Hub.
        text_column: name of the column.
        train_split, val_split, test_split: names of the splits. If val_split and test_split are both None, or the data
            set was saved without splits, val_fraction and test_fraction of the training split are held out.
        settings: see `TokenStream` and `DataModule`.

    Raises:
        ValueError: a folder, file or column is missing, the column is not text, or a split has no text.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        config: str | None = None,
        root: str | None = None,
        text_column: str = "text",
        train_split: str = "train",
        val_split: str | None = "validation",
        test_split: str | None = "test",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not name and not root:
            raise ValueError("name=null, root=null: say which data set of the Hub, or give a folder with parquet files")
        if (val_split is None) != (test_split is None):
            raise ValueError(f"val_split={val_split}, test_split={test_split}: name both parts, or none of them")
        self.hub_name = name
        self.config = config
        self.root = root
        self.text_column = text_column
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.notes: list[str] = []

    @property
    def source(self) -> str:
        return f"root={self.root}" if self.root else f"name={self.hub_name}"

    def load(self) -> Parts:
        train = self.read_documents(self.train_split)
        if self.val_split is None or self.test_split is None or is_unsplit(self.root):
            copies = sum(map(has_text, train)) - len(set(filter(has_text, train)))
            self.notes = [f"{copies:,} of {len(train):,} documents are copies of others"] if copies else []
            return self.split_text(join_documents(train))
        val, test = self.read_documents(self.val_split), self.read_documents(self.test_split)
        known = set(filter(has_text, train))
        self.notes = [
            f"{copies:,} of {len(documents):,} documents of {split} are training documents, too"
            for split, documents in ((self.val_split, val), (self.test_split, test))
            if (copies := sum(document in known for document in documents))
        ]
        if self.folds is None:
            return Parts([join_documents(train)], join_documents(val), join_documents(test))
        text = join_documents(train)
        begin, end = (len(text) * fold // self.folds for fold in (self.fold, self.fold + 1))
        return Parts([piece for piece in (text[:begin], text[end:]) if piece], text[begin:end], join_documents(test))

    def read_documents(self, split: str) -> list[str]:
        """Read the documents of a split."""
        table = hub_table(self.hub_name, split, self.config) if self.root is None else file_table(self.root, split)
        table.check_columns(text_column=self.text_column)
        documents = list(table.column(self.text_column))
        for row, document in enumerate(documents):
            if not isinstance(document, str):
                raise ValueError(f"{table.where(row)}: {self.text_column} is no text there ({document!r})")
        if not any(map(has_text, documents)):
            raise ValueError(f"{self.source}: the {split} split has no text in {self.text_column}")
        return documents

    def caveats(self) -> list[str]:
        return [*super().caveats(), *self.notes]


def join_documents(documents: list[str]) -> str:
    return "\n\n".join(documents)


def has_text(document: str) -> bool:
    return bool(document.strip())

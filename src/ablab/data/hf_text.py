"""Any text data set in the layout of the Hugging Face Hub: a column of documents."""

from __future__ import annotations

from typing import Any

from ablab.data.hf_image import parquet_files, read_parquet
from ablab.data.hub import load_split
from ablab.data.token_stream import Parts, TokenStream


class HFText(TokenStream):
    """The documents of a column, one after the other, with a blank line between them.

    Args:
        name: the data set's name on the Hub, for example "Salesforce/wikitext".
        config: its configuration there, for example "wikitext-2-raw-v1".
        root: a folder with its parquet files, `<split>.parquet` or `<split>-….parquet`; None asks the Hub.
        text_column: the column's name.
        train_split, val_split, test_split: names of the parts; None holds val_fraction and test_fraction out of the
            training part, and then both are None.
        settings: see `TokenStream` and `DataModule`.

    Raises:
        ValueError: a missing folder, file or column, a column that is no text, or a part that has none.
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

    @property
    def source(self) -> str:
        return f"root={self.root}" if self.root else f"name={self.hub_name}"

    def load(self) -> Parts:
        train = self.documents(self.train_split)
        if self.val_split is None or self.test_split is None:
            return self.divided(train)
        test = self.documents(self.test_split)
        if self.folds is None:
            return Parts([train], self.documents(self.val_split), test)
        begin, end = (len(train) * fold // self.folds for fold in (self.fold, self.fold + 1))
        return Parts([piece for piece in (train[:begin], train[end:]) if piece], train[begin:end], test)

    def documents(self, split: str) -> str:
        if self.root is None:
            table: Any = load_split(self.hub_name, split, self.config)
        else:
            table = read_parquet(self.root, split, parquet_files(self.root, split))
        if self.text_column not in table.column_names:
            raise ValueError(
                f"{self.source}: the {split} split has the columns {', '.join(table.column_names)}, and "
                f"{self.text_column} is missing; name it with data.text_column"
            )
        documents = table[self.text_column][:]
        for row, document in enumerate(documents):
            if not isinstance(document, str):
                raise ValueError(f"{self.source}: {split} row {row} of {self.text_column} is no text ({document!r})")
        text = "\n\n".join(documents)
        if not text.strip():
            raise ValueError(f"{self.source}: the {split} split has no text in {self.text_column}")
        return text

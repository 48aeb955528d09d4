"""The section of a config that says where images come from and how they are cut."""

from __future__ import annotations

from pydantic import Field, model_validator

from vfmlab.config.section import Section


class Data(Section):
    """Where images come from and how they are cut.

    `source` is one string: `scenes:easy|medium|hard|groups` (procedural), `folder:PATH`, `hf:NAME`,
    `parquet:PATH`, `wds:PATTERN`.
    """

    source: str = "scenes:medium"
    size: int = Field(32, ge=8, le=8192, description="images are size x size after ADM's centre crop")
    train: int | None = Field(None, ge=1, le=10**10, description="cap on training images; scenes need it")
    val: int = Field(1000, ge=1, le=10**10,
                     description="held-out images, taken from the source's own split where it has one")
    flip: bool = Field(False, description="random horizontal flips in training")
    crop: tuple[float, float] | None = Field(None, description="in a tokenizer's training, and in that of "
        "a generator whose images are encoded anew (diffusion.cache=false, diffusion.tune, ar.cache=false; "
        "what is cached is of the centre crop, or of ar.ten_crops): a square at a random place, its side a "
        "random share of the short side, resized (Lanczos); null: the centre crop")
    least_side: int | None = Field(None, ge=1, description="pixels; in a tokenizer's training images with a "
        "shorter side are left out; null: none are")
    image_column: str | None = Field(None,
                                     description="parquet / hf column with the image; None: found by type")
    label_column: str | None = Field(None, description="parquet / hf column with the class, field of a "
                                     "shard's .json; None: found by name, in shards 'label'; empty: none")
    caption_column: str | None = Field(None, description="parquet / hf column with the caption, for "
                                       "diffusion.text; null: found by name")
    seed: int = 0
    workers: int = Field(0, ge=0, description="loader processes; 0 decodes in the training process (and "
                                              "caches small sets)")

    @model_validator(mode="after")
    def _shares(self) -> Data:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop {list(self.crop)}: give the smallest and the largest share of the short "
                             "side, 0 < low <= high <= 1, for example [0.5, 1.0]")
        drawn = self.source.partition(":")[0] == "scenes"
        for field in ("crop", "least_side"):
            if drawn and getattr(self, field) is not None:
                raise ValueError(f"{field} {getattr(self, field)}: scenes are drawn at data.size; set "
                                 f"{field} to null, or read photographs")
        return self

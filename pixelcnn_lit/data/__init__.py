"""Images from disk to batches: one LightningDataModule, and one file per source."""

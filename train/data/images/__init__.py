"""Images: files, folders, data sets, augmentation."""

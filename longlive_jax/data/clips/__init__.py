"""Training clips: captioned shots in video files, joined, decoded or encoded, and fed to training.

    samples = usable(find_samples(folder), folder)                          # dataset
    source = VideoClips(samples, JoinSpec(chunks=12), size=(704, 1280))     # source: decode videos
    source = EncodedClips(folder)                                           # store: or read latents
    with ClipFeed(source, FeedSpec(batch=8, rank=0, count=4), start=step) as feed:  # loader
        for rows in feed:
            batch, text = collate(rows, source.empty_text_features)         # batches: encoded clips

`clip_plan` holds the joining rules, `encoding` turns a dataset into a store of encoded clips, and
`check` reports on a dataset. The modules that worker processes import (all but `batches`,
`encoders`, `encoding` and `sharded_encoders`) compute nothing with JAX and initialise no device.
"""

"""Training clips: captioned shots in video files, joined, decoded or encoded, and fed to training.

    samples = usable(find_samples(folder), folder)                        # .dataset
    source = VideoClips(samples, JoinSpec(chunks=12), size=(704, 1280))   # .source, .plan
    source = EncodedClips(folder)                                         # .store; or this one
    with ClipFeed(source, FeedSpec(batch=8, rank=0, count=4), start=step) as feed:  # .feed
        for rows in feed:
            batch, text = collate(rows, source.empty)                     # .episodes; encoded clips

`encoding` makes an encoded store of a dataset, `check` reports on one. What worker processes import
(all but `episodes`, `encoders` and `encoding`) computes nothing with JAX and starts no device.
"""

"""Documents and rows become token ids with a loss mask, and these become packed batches.

Read in this order:

    prepare.py     the stage in one screen: what is called below, and what it writes
    sections.py    documents → sections; a reader for each kind of file: pdf.py, markdown.py, text.py
                   (they give blocks.py; headings.py finds headings by their words alone)
    rows.py        what a row is; rows one by one, from what entries.py reads in files and formats.py makes of it
    source.py      all rows, as often as they are asked for; extract.py makes rows from sections without a model
    named.py       data sets by their names, with their prompts; set_rows.py reads one from the hub or from local files
    sources.py     what the config names: files, sets, mixtures, rows to replay
    attribute.py   which section, and so which page, a row speaks of
    scan.py        what rows have in common, in a few bytes a row
    held_out.py    which rows are never trained, and the guarantees that hold between the two
    template.py    a conversation → token ids, and the mask that says which of them are trained
    fit.py         plain text in chunks, rows that are too long, and rows put together into conversations
    write.py       a set of rows → its file and its tokens
    tokens.py      the token store on disk
    key.py         what the prepared data depends on, wherever it lies
    draws.py       draws by the seed, each kind with a stream of its own
    mixture.py     how often each sample comes in an epoch
    packing.py     lengths → contexts, an index that is computed from (seed, epoch)
    batches.py     position → one rank's micro-batches of a step
    show.py        what was prepared, for a person to look at
"""

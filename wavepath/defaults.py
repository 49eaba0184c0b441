"""Every field of a wavepath config, with its default, in one place.

A config file in `configs/` starts from `train_defaults()` or `prepare_defaults()` and changes what its setting needs; the command line
overrides single fields (`--config.lr=3e-4`). Fields are locked: a name that is not here is an error.
"""

from ml_collections import ConfigDict


def prepare_defaults() -> ConfigDict:
    """Slides to tiles: tissue, screening, selection, extraction. Lengths in micrometres or pixels as named, mpp = um per pixel."""
    return ConfigDict(
        dict(
            seed=0,
            # Tissue and quality (METHODS 1.4; CLAM's segmentation constants where they carry over).
            tissue=dict(
                mpp=8.0,  # mask grid; the pixels behind it are read at screen.mpp
                saturation=0.05,  # HSV saturation above which a cell may be tissue (0..1)
                white=0.95,  # luminance above which a cell is glass, however coloured
                dark=0.6,  # luminance below which a cell is tissue, however grey
                grey=0.9,  # luminance below which a grey cell is tissue if it has
                structure=4e-4,  # this coarse detail energy (mean square, values 0..1)
                black=0.12,  # luminance below which a flat cell is scanner padding
                window_um=40.0,  # and foreground where, in a window this wide,
                coloured=0.33,  # this share is coloured: half would be a median filter, less keeps the thin walls of fat
                close_um=32.0,  # morphological closing
                min_area_um2=40000.0,  # smaller tissue pieces are dropped
                max_hole_um2=20000.0,  # smaller holes are filled
                min_share=0.01,  # the two areas above are at most this share of the slide, for slides that are small themselves
                pen=True,
                pen_density=0.5,  # optical density in green from which red may be ink
                pen_red_blue=0.74,  # blue density over green density above which red is ink; eosin and blood have 0.45 to 0.7
                pen_black=0.5,  # mean optical density from which grey may be ink
                pen_area_um2=300.0,  # a stroke has a certain core at least this large
                pen_veil_um2=4000.0,  # and one of red ink over tissue, which could be blood, this large
                pen_reach_um=400.0,  # faint ink is followed this far from the core
                pen_margin_um=8.0,  # and this much is taken off round it
                blur=True,
                blur_floor=2e-4,  # tissue is out of focus where its fine detail energy is below this
                blur_ratio=0.08,  # and fine over coarse detail energy below this,
                blur_relative=0.4,  # or both below these shares of the slide's medians
                blur_relative_ratio=0.5,
                blur_noise=6e-6,  # energy that rounding and compression add
                blur_empty=1e-4,  # coarse energy below which there is no structure at all
                blur_window_um=72.0,
            ),
            # Screening (METHODS 1.2, 1.4).
            screen=dict(
                mpp=2.0,  # 5x
                wavelet="db4",
                level=1,  # number of levels whose details are pooled
                level_weights=(),  # one for each level, the finest first; empty: all 1
                boundary="periodization",  # or symmetric, reflect, zero, periodic, constant
                energy="absolute",  # or relative: detail / (detail + approximation)
                channel="luminance",  # or hematoxylin (optical density)
                region_um=448.0,  # 224 px at 5x
                min_region_um=112.0,  # 56 px at 5x, the smallest tried where a slide has few regions
                min_regions=50,  # below this many eligible regions the region side is halved
                min_tissue=0.1,  # a region counts from this share of clean tissue
                max_pen=0.05,  # a region with a larger share of pen is not eligible
                max_blur=0.5,  # nor one with a larger share out of focus
                clip_percentile=99.5,  # nor one with more energy than this percentile, an artefact as a rule; 100 switches it off
            ),
            select=dict(mode="wavelet", top=0.2, threshold=0.0, count=0),  # wavelet | random | all | threshold; count > 0 replaces top
            # Extraction (METHODS 1.2).
            tiles=dict(
                mpp=0.25,  # 40x; an upper resolution: a coarser slide gives tiles at its own mpp
                require_mpp=False,
                size=224,
                min_tissue=0.5,
                max_per_slide=0,  # 0: no limit; else an even-handed draw over the regions
                codec="jpeg",  # or png
                quality=90,
            ),
            # Aligned crops of one place at several magnifications, for super-resolution (METHODS 4.7).
            pyramids=dict(
                mpp=0.25,  # of the finest level; an upper resolution: a coarser slide gives crops at its own mpp
                size=1024,  # px at the finest level, halved from level to level
                levels=3,  # 1024, 512, 256; a fourth (128) serves 8x from the pyramid's own level
                per_slide=0,  # at most so many of a slide, drawn evenly over its tissue; 0: all that fit without overlap
                count=0,  # at most so many of all slides together, each slide an even share; 0: no limit
                min_tissue=0.5,  # share of tissue under which a crop counts as blank
                min_size=128,  # shorter sides of single images below this are left out
                split="slide",  # or sample: what is never on both sides of training and test
                test_share=1 / 6,
                codec="png",  # or jpeg
                quality=95,
            ),
            # H&E beside its immunostain (METHODS 3.5).
            pairs=dict(
                max_shift=16.0,  # px; a pair that is surely shifted by more is
                on_shift="keep",  # kept and listed; or drop: left out; or correct: both sides are cut to what they share
                on_unsure="keep",  # or drop: pairs whose shift cannot be told
                min_size=64,  # px of the shorter side, after a correction
                test_share=1 / 6,  # of the slides, where the pairs' own names do not say
                codec="png",  # or jpeg
                quality=95,
            ),
        )
    )


def train_defaults() -> ConfigDict:
    """One training run: task, model, data, optimiser, loop. Durations are `<n>` steps unless the field's name says otherwise."""
    return ConfigDict(
        dict(
            task="mae",
            seed=0,
            batch_size=256,
            lr=1.5e-4,  # for 256 examples a step; the rate used is lr * batch_size / 256 (METHODS 5.1)
            init_from="",  # run folder whose parameters start this one; {fold} and {seed} in it stand for data.fold and seed
            encoders="",  # of task `stain`: run folder of task `stain_encoders` whose encoders serve it frozen, likewise; or random: a control
            profile="",  # "10:20" traces steps 10 to 19 into the run folder
            model=dict(
                variant="B",  # XT, Ti, S, B, L, H; or custom: the next three
                width=0,
                depth=0,
                heads=0,
                patch=16,
                image_size=224,
                decoder_width=512,
                decoder_depth=8,
                decoder_heads=16,
                mask_ratio=0.75,
                mask_groups=0,  # 0: one mask for each image; n > 0: the batch is cut into n groups, one mask each
                dtype="bfloat16",  # compute; parameters stay float32
                attention="auto",  # auto, xla, cudnn, cpu
                scan=False,
                remat="none",  # none, full, dots
                drop_path=0.0,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
                # What imported encoders have beside (docs/weights.md).
                mlp="gelu",  # or swiglu
                mlp_hidden=0,  # channels that its second layer reads; 0: 4 times the width
                norm_eps=1e-6,
                qkv_bias=True,
                layer_scale=0.0,  # above 0: each branch has learned factors that begin with this
                register_tokens=0,
                positions="sincos",  # or learned
                position_grid=0,  # side of the learned table in patches; 0: that of image_size
                final_norm=True,
            ),
            loss=dict(
                norm_pix=True,
                contrast_weight=0.0,
                contrast_temperature=0.2,
                # Reconstruction of masked patches: weights of squared error, 1 - SSIM, and distance of co-occurrence matrices (METHODS 2.3).
                mse=1.0,
                ssim=0.0,
                glcm=0.0,
                second=dict(start="", mse=0.1, ssim=1.0, glcm=1.0),  # weights from there on; "50%", "200ep" or steps; empty: one phase
                ssim_window=dict(
                    kind="gaussian",  # or uniform
                    size=11,
                    sigma=1.5,
                    scale="image",  # each image by its own range of values; or data: by the training set's
                ),
                cooccurrence=dict(
                    levels=256,
                    offsets=((0, 1), (1, 0)),  # (rows down, columns right)
                    channel="first",  # of the image as the model sees it; or rgb (each), luminance, hematoxylin, optical_density
                    membership="sigmoid",  # or triangular, hard
                    sharpness=0.0,  # widths of the membership's slope in a level; 0: the membership's own (sigmoid 30, triangular 1)
                    sharpness_start=0.0,  # above 0: rises from here to `sharpness` while the term is at work
                    reweight=True,  # P (1 - P / sum P)
                    normalize=False,  # matrices that sum to 1, times levels squared; else counts
                    distance="squared",  # or l1, jensen_shannon
                    value_range=(),  # of the channel (first, rgb: normalised by model.mean and std); empty: that of the training set, measured
                    clip_percentile=0.0,  # of the values, left out at each end
                ),
            ),
            data=dict(
                dir="",  # a prepared dataset or a folder of images; empty together with `slides`: phantoms are made in the run folder
                slides="",  # stream tiles from these slides, with the `prepare` settings below
                mpp_csv="",
                slide_mpp=0.0,
                order="auto",  # blocks for a stream (each native tile is decoded once), else global
                window=8,  # regions interleaved in `blocks` order
                mixed_mpp=False,
                on_corrupt="error",  # or replace: take the next index, and count
                threads=0,  # that decode; 0: one for each core of the process
                prefetch=2,
                cache_mb=512,
                exclude_slides="",  # text file of slide ids to leave out
                max_tiles=0,  # 0: all; else the first n of a fixed shuffle (equal-budget controls)
                labels="",  # labels.csv by slide or by tile, or a folder of GeoJSON regions: for tasks that learn from labels
                label_pattern="",  # or a regular expression with one group that reads the label from the tile's name
                case_pattern="",  # likewise the case (patient), which is never split over folds
                folds=5,  # of the cross-validation
                fold=0,  # the one that is held out
                fold_seed=0,
                # Of task `mil`; `labels` is then a table by slide, and `folds=0` leaves one case out at a time.
                bags="",  # feature files (wavepath embed, TRIDENT, CLAM), {fold}, {seed} as in init_from; empty: synthetic bags in the run folder
                missing="error",  # slides of the labels without a feature file; or skip: they are left out, and counted
                splits="",  # camelyon16 (its official test set), or CLAM's splits_<fold>.csv, or a folder of them; empty: folds
            ),
            prepare=prepare_defaults(),
            # Task `finetune` (METHODS 2.5).
            finetune=dict(
                classes=0,  # 0: as many as the labels name
                pool="mean",  # of the last block's patch tokens, with a norm of its own; or cls
                layer_decay=0.75,  # rate of each block over that of the block behind it; 1: one rate for all
                label_smoothing=0.1,
                rand_ops=2,  # random operations on each view (ops/randaugment), 0 is off;
                rand_magnitude=9.0,  # of 0 to 10,
                rand_std=0.5,  # varied by this deviation,
                rand_probability=0.5,  # each with this probability
                erasing=0.25,  # share of views with an erased box
            ),
            # Task `mil` (METHODS 5.3 to 5.5).
            mil=dict(
                network="abmil",  # gated attention; or abmil_plain, clam_sb, clam_mb, transmil, mean, max
                pool="cls",  # column of the feature files: the one called `features`; or mean: `features_mean` of wavepath embed
                validation=0.1,  # share of the cases outside of the test part that is kept for early stopping; 0: none
                max_tiles=0,  # of a bag in a training step, drawn anew each epoch; 0: all, as in evaluation
                buckets=(),  # sizes that bags are padded to; empty: 16, 24, 32, 48, 64, ...
                classes=0,  # 0: as many as the labels name
                features=0,  # width of the features; 0: as they are found
                # 0 (of dropout: below 0) is the network's own: see tasks/mil.
                embed=0,  # width of the first layer; below 0: none, of the networks that can do without
                hidden=0,  # width inside the attention
                dropout=-1.0,
                heads=8,  # of transmil
                head_width=64,
                landmarks=256,
                class_weights="balanced",  # of the loss, by the training slides; or none
                bag_weight=0.7,  # of CLAM's loss; the other networks have the bag's alone
                inst_weight=0.3,
                inst_tiles=8,  # B
                inst_margin=0.0,  # 0: cross-entropy; 1: smooth top-1 SVM
                subtyping=False,  # classes exclude each other: the tiles of one are no evidence for another
            ),
            # Task `classify` (METHODS 4.8); classes and smoothing as of `finetune`.
            classify=dict(depth=50),  # of the ResNet: 18, 34, 50, 101
            # Task `superres` (METHODS 4).
            superres=dict(
                network="cwt-net",  # or srcnn, edsr, rcan
                scale=2,  # 2, 4, 8
                patch=64,  # side of the low-resolution training patches in px
                margin=16,  # px by which the windows that are read exceed the patch: room for a random place
                lr_source="bicubic",  # low resolution by bicubic reduction of the finest level; or pyramid: the level itself
                channels=64,
                blocks=12,  # cross-scale wavelet transformer blocks
                sr_blocks=2,  # residual blocks of the SR branch in each of them
                wavelet_blocks=0,  # and of the wavelet branch; 0: by scale, 2 3 4 at 2x 4x 8x
                wr_blocks=0,  # channel-attention blocks of the wavelet reconstruction; 0: by scale, 4 6 8
                growth="doubling",  # how these two grow: one and two for each doubling of the scale; or unit: literally for each 1 of it
                reduction=8,  # of the channel attention
                res_scale=1.0,
                attention_chunk=0,  # rows of scores held at once; 0: chosen
                skip="none",  # or bicubic: the network learns what is missing in the enlarged input
                wavelet_branch=True,
                dwt=True,
                wr=True,
                wr_share=0.5,  # of the training steps that see the reconstructed instead of the true detail
                mode="wr",  # of evaluation: wr reads the low resolution alone, ref the next level as well
                mean=(),  # RGB subtracted at the input; empty: that of the training set, measured (published: 0.7204, 0.4298, 0.6379)
                dtype="float32",
                remat=False,
                # Loss (METHODS 4.5).
                sr_weight=0.3,
                wt_weight=0.7,
                ssim_weight=0.2,
                pixel="l1",  # or mse
                # Baselines.
                srcnn=dict(kernels=(9, 1, 5), channels=(64, 32)),
                edsr=dict(blocks=16, channels=64, res_scale=1.0),
                rcan=dict(groups=10, blocks=20, channels=64, reduction=16),
            ),
            # Tasks `stain_encoders` and `stain` (METHODS 3).
            stain=dict(
                crop=512,  # side of the training crops in px; of the encoders 256
                margin=0,  # px by which the windows that are read exceed the crop: room for a random place
                # Generator.
                channels=64,
                blocks=6,  # residual blocks of the body
                encoder="vmfe",  # or plain: 3x3 convolutions in place of the wavelet ones; resnet: pix2pix's
                msfpm=True,  # conv-GRU over the scales
                coa=True,  # cross-attention over the H&E encoder's features
                fusion=0.2,  # weight of what was attended
                wavelet="haar",
                grid=2,  # parts on a side in which images go through the encoders
                attention="auto",  # chunked, dense
                attention_chunk=0,  # queries whose scores are held at once; 0: chosen
                # Encoders.
                encoder_channels=64,
                encoder_blocks=6,
                # Discriminator.
                discriminator_channels=64,
                discriminator_layers=3,
                # Generator and discriminator. batch: as published; group, instance: for steps of one image, whose batch statistics are not those of
                # the running means.
                norm="batch",
                encoder_norm="batch",  # of both encoders; their steps have many images
                dtype="float32",
                remat=False,
                # Loss of the encoders.
                temperature=0.07,
                symmetric=False,  # immunostains look for their H&E as well
                # Losses of the generator; weights of L1 count differences of values in [-1, 1], as published.
                gan="vanilla",  # or hinge, lsgan
                gan_weight=1.0,
                l1="adaptive",  # weighted by how far the encoders' features agree; or fixed; or pyramid: of four smoothed and reduced images
                l1_weight=100.0,
                l1_grid=2,  # parts on a side that are weighted one by one
                pyramid_weight=25.0,
                octaves=4,
            ),
            augment=dict(crop_scale=(0.2, 1.0), crop_ratio=(0.75, 1.3333), hflip=True, vflip=True, rot90=True, stain_jitter=0.0),
            optim=dict(
                name="adamw",  # or adam, whose weight decay is a part of the gradient (L2), or sgd
                b1=0.9,
                b2=0.95,
                weight_decay=0.05,
                clip_norm=0.0,  # 0: off
                warmup="5%",  # steps, or "<p>%" of the run, or "<e>ep" epochs
                schedule="cosine",  # behind the warm-up: half a cosine to min_lr; halve: by 2 every `halve_every`; linear; or constant
                halve_every="25%",  # durations as of the warm-up, counted from the first step
                hold="50%",  # of linear, likewise: the peak rate until there, then a straight line to min_lr at the end
                min_lr=0.0,
                accumulate=1,
            ),
            ema=0.0,  # 0: off; else the decay
            train=dict(
                steps=0,  # one of steps, epochs or examples is given
                epochs=0.0,
                examples=0,
                log_every=10,
                save_every=500,
                save_seconds=0.0,  # > 0: also by time
                keep=3,
                panels_every=500,
                eval_every=0,
                eval_epochs=0.0,  # above 0: in place of eval_every, in epochs
                eval_examples=256,
                patience=0,  # evaluations in a row without a lower eval_loss that end the run, the best checkpoint kept; 0: never
                patience_after="0",  # no end before: steps, "<p>%" or "<e>ep", as of optim.warmup
            ),
            parallel=dict(
                backend="jit",  # or pmap, shard_map
                devices=0,  # 0: all local devices
                fsdp=1,  # of jit: neighbours that divide parameters, moments and averages among them; 1: each holds all, 0: all devices
                fsdp_min_size=2**14,  # elements below which an array stays whole
                fsdp_rules=(),  # ((regular expression, dimension or None), ...): exceptions, by the path of an array
            ),
            writers=dict(tensorboard=True, wandb=""),
        )
    )

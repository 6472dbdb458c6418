"""Names of what ``pipelines/paper`` runs, and the figures that the paper gives for it."""

FIRST_TABLE = {"cifar10": "Table 1, Figure 3", "imagenette": "Figure 6"}
SINGLE = "witches_brew"  # the attack on one image, which succeeds or does not
NONE = "–"  # has not run
ATTACKS = {"badnets": "BadNet", "smooth": "smooth trigger", "witches_brew": "Witches' Brew"}
DETECTORS = {
    "spectral_paper": "Spectral Signatures (`paper`)",
    "spectral_tran": "Spectral Signatures (`tran`)",
    "spectral_tran_restricted": "Spectral Signatures (`tran`), rows labelled as predicted",
    "activation_clustering": "Activation Clustering",
    "activation_clustering_restricted": "Activation Clustering, rows labelled as predicted",
    "frequency": "frequency detector",
    "frequency_restricted": "frequency detector, rows labelled as predicted",
    "frequency_suspect": "frequency detector, learning from suspect rows",
    "poison_forensics": "Poison Forensics",
    "ekfac": "EK-FAC, largest 27 %",
    "ekfac_zero": "EK-FAC > 0",
    "delta_influence": "Delta-Influence, all rows",
    "delta_restricted": "Delta-Influence, rows labelled as predicted",
    "normalised": "normalised influence",
}
ABLATIONS = {
    "delta_influence": "image and label",
    "delta_image": "image only",
    "delta_label": "label only",
}
SEVERAL = {
    "ekfac": "EK-FAC, 1 input",
    "delta_influence": "Delta-Influence, 1 input",
    "ekfac_5": "EK-FAC, 5 inputs",
    "ekfac_boosted_5": "EK-FAC (boosted), 5 inputs",
    "delta_5": "Delta-Influence, 5 inputs",
    "ekfac_10": "EK-FAC, 10 inputs",
    "ekfac_boosted_10": "EK-FAC (boosted), 10 inputs",
    "delta_10": "Delta-Influence, 10 inputs",
}
UNLEARNERS = {
    "eu": "EU",
    "cf": "CF, two fifths of the epochs, thrice the rate",
    "cf_fifth": "CF, a fifth of the epochs",
    "cf_full": "CF, all epochs",
    "cf_last": "CF, last 2 layers",
    "ssd": "SSD, batches",
    "ssd_sample": "SSD, single rows",
    "scrub": "SCRUB",
    "scrub_cmu": "SCRUB (`cmu`)",
    "scrub_paper": "SCRUB (the paper's run)",
    "badt": "BadT, one epoch",
    "badt_long": "BadT, five epochs",
    "potion": "Potion",
}
COUNTERFACTUALS = {
    "nothing": "nothing",
    "found": "flagged poison",
    "missed": "poison that is not flagged",
    "any_poison": "as much poison, at random",
    "clean": "as many clean rows of the target class",
    "third": "the most suspicious third of what is flagged",
}
# Precision / TPR in per cent: Table 1, and Table 4, which also has PSR and accuracy after EU; the
# body of Table 5 is not in the text at hand.
PUBLISHED = {
    ("cifar10", "badnets"): {
        "spectral_paper": "3.6 / 88.3",
        "activation_clustering": "2.2 / 94.9",
        "frequency": "8.0 / 72.3",
        "ekfac": "2.8 / 67.1",
        "delta_influence": "17.6 / 99.1",
        "delta_image": "13.9 / 61.6 (released run)",
        "delta_label": "3.2 / 100 (released run)",
    },
    ("cifar10", "smooth"): {
        "spectral_paper": "1.3 / 88.3",
        "activation_clustering": "2.2 / 99.1",
        "frequency": "0.4 / 3.2",
        "ekfac": "2.9 / 100",
        "delta_influence": "13.3 / 100",
    },
    ("cifar10", "witches_brew"): {
        "spectral_paper": "1.4 / 96.8",
        "activation_clustering": "2.1 / 93.4",
        "frequency": "10.2 / 93.6",
        "ekfac": "0.8 / 17.4",
        "delta_influence": "3.3 / 19.4",
    },
    ("imagenette", "badnets"): {
        "ekfac": "10.5 / 99.3; 0 / 72.4",
        "delta_influence": "25.8 / 99.3; 0 / 75.4",
        "ekfac_5": "12.8 / 99.0; 0 / 74.4",
        "ekfac_boosted_5": "21.8 / 99.0; 0.3 / 74.0",
        "delta_5": "27.5 / 99.3; 0.3 / 76.6",
        "ekfac_10": "12.9 / 99.3; 0 / 74.1",
        "ekfac_boosted_10": "24.2 / 99.3; 0.3 / 73.6",
        "delta_10": "28.7 / 99.3; 0.3 / 75.0",
    },
    ("imagenette", "witches_brew"): {
        "spectral_paper": "9.6 / 75.9 (released run)",
        "activation_clustering": "7.5 / 30.1 (released run)",
        "frequency": "21.8 / 100 (released run)",
        "ekfac": "18.0 / 93.6 (released run)",
        "delta_influence": "61.5 / 92.6 (released run)",
        "delta_image": "2.1 / 1.0 (released run)",
        "delta_label": "31.8 / 98.2 (released run)",
    },
}
# PSR / accuracy in per cent: the authors' released run of BadNet on CIFAR-10 (99.7 / 91.7 before),
# on Delta-Influence's flags.
REPAIRED = {
    "eu": "0 / 91.8",
    "cf_full": "0 / 93.0",
    "ssd": "0.1, 1.0 / 10.0 (two settings)",
    "scrub_paper": "0 / 81.2",
    "badt": "45.3 / 91.2",
}

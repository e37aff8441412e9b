"""Does selection help, on this student and this data? Arms × seeds at one budget, paired, with intervals."""

"""The command lines and files of AnswerDotAI/fsdp_qlora, read and translated."""

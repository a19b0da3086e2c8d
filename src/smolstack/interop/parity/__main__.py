from smolstack.interop.parity.command import main

main()

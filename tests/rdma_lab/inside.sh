# shellcheck shell=bash
# Sourced by every command in a guest: one Soft-RoCE device, rxe0, on an interface with an address.
#
# LAB_END: empty in a guest of its own (10.9.0.1), 0 or 1 at an end of a link (10.8.0.1, 10.8.0.2).
if [ -z "${LAB_END:-}" ]; then
    export LAB_ADDRESS=10.9.0.1
    lab_device=lab0
    ip link add lab0 type dummy
else
    export LAB_ADDRESS=10.8.0.$((LAB_END + 1))
    lab_device=eth0
fi
ip link set "$lab_device" mtu 1500
ip addr add "$LAB_ADDRESS/24" dev "$lab_device"
ip link set "$lab_device" up
rdma link add rxe0 type rxe netdev "$lab_device"
export LAB_DEVICE=$lab_device
# Bounds of seconds are checked by this clock: another than the one that guest.py asked for may run at any rate.
read -r lab_clock </sys/devices/system/clocksource/clocksource0/current_clocksource
[ "$lab_clock" = hpet ] || { echo "the guest's clock is $lab_clock, not hpet"; exit 1; }

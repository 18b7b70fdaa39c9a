//! Steers the machine behind the driver doubles from another process: `hotset chaos --processes --doubles` starts it, and writes a
//! line for each fault.
//!
//! Usage: `double-faults MACHINE GPUS MIB`: makes the machine in this file, its GPUs with so much for hotset, then reads lines until
//! its input ends:
//!
//! - `sticky GPU ERROR`: the next process to call gets this error, and never anything else
//! - `lost GPU 0|1`: it is gone, or back
//! - `refuse GPU COUNT`: so many of the next allocations find no memory
//! - `foreign GPU MIB`: so much is taken by processes that are no doubles
//! - `hang GPU 0|1`: calls do not return
//! - `xid GPU NUMBER`: an Xid event
//! - `reap`: what dead processes had is given back, as the driver does it
//! - `left`: prints how many bytes are allocated on all GPUs, and what was done wrongly

use std::io::BufRead;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;

use hotset_double_machine::Machine;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, gpus, mib] = arguments.as_slice() else {
        eprintln!("usage: double-faults MACHINE GPUS MIB");
        std::process::exit(2);
    };
    let (Ok(gpus), Ok(mib)) = (gpus.parse::<usize>(), mib.parse::<u64>()) else {
        eprintln!("GPUS and MIB are numbers");
        std::process::exit(2);
    };
    let machine = Machine::create(Path::new(path), gpus);
    for i in 0..gpus {
        let gpu = machine.gpu(i);
        // Beside what the driver takes, and contexts of some workers.
        let taken = gpu.reserved.load(SeqCst) + 16 * gpu.context.load(SeqCst);
        gpu.total.store(taken + (mib << 20), SeqCst);
        gpu.granularity.store(64 << 10, SeqCst);
    }
    println!("ready");
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok());
        match (words.first().copied(), number(1), number(2)) {
            (Some("reap"), ..) => machine.reap(),
            (Some("left"), ..) => {
                let left: u64 = (0..gpus)
                    .map(|i| machine.gpu(i).allocated.load(SeqCst))
                    .sum();
                println!("{left} {}", machine.misuse().replace('\n', "; "));
            }
            (Some(what), Some(gpu), Some(value)) if (gpu as usize) < gpus => {
                let gpu = machine.gpu(gpu as usize);
                let small = value as u32;
                match what {
                    "sticky" => gpu.sticky.store(small, SeqCst),
                    "lost" => gpu.lost.store(small, SeqCst),
                    "refuse" => gpu.refuse_allocations.store(small, SeqCst),
                    "foreign" => gpu.foreign.store(value << 20, SeqCst),
                    "hang" => gpu.hang.store(small, SeqCst),
                    "xid" => gpu.raise_xid(value),
                    _ => eprintln!("not understood: {line}"),
                }
            }
            _ => eprintln!("not understood: {line}"),
        }
    }
}

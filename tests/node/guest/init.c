/*
 * All that is in a machine's initramfs, beside the modules /0, /1, ...: load them, mount /dev/vda and start its init.
 *
 * Debian's own initramfs does the same with a shell, udev and some fifty processes, which under emulation is a sixth of a boot.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROOT "/root"
#define DISK "/dev/vda"

static void need(int failed, const char *what)
{
	if (failed) {
		perror(what);
		_exit(1); /* the kernel panics, and says that its init is gone */
	}
}

static void load_modules(void)
{
	for (int number = 0;; number++) {
		char path[16];
		snprintf(path, sizeof path, "/%d", number);
		int module = open(path, O_RDONLY | O_CLOEXEC);
		if (module < 0)
			return;
		/* one for what this processor lacks says so, and another does its work */
		need(syscall(SYS_finit_module, module, "", 0) != 0 && errno != ENODEV, path);
		close(module);
	}
}

/* The last of "ro" and "rw" on the kernel's command line holds, as for the kernel itself. */
static unsigned long read_only(void)
{
	char line[4096] = "";
	unsigned long flag = 0;
	FILE *file = fopen("/proc/cmdline", "r");
	need(file == NULL || fgets(line, sizeof line, file) == NULL, "/proc/cmdline");
	fclose(file);
	for (char *word = strtok(line, " \n"); word != NULL; word = strtok(NULL, " \n")) {
		if (strcmp(word, "ro") == 0)
			flag = MS_RDONLY;
		else if (strcmp(word, "rw") == 0)
			flag = 0;
	}
	return flag;
}

int main(int count, char **arguments)
{
	(void)count;
	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mkdir(ROOT, 0755);
	need(mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) != 0, "/dev");
	need(mount("proc", "/proc", "proc", 0, NULL) != 0, "/proc");
	load_modules();
	for (int tries = 0; access(DISK, F_OK) != 0 && tries < 1000; tries++)
		usleep(10000);
	need(mount(DISK, ROOT, "ext4", read_only(), NULL) != 0, DISK);
	need(umount("/proc") != 0, "/proc");
	need(mount("/dev", ROOT "/dev", NULL, MS_MOVE, NULL) != 0, ROOT "/dev");
	need(chdir(ROOT) != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0, ROOT);
	execv("/sbin/init", arguments);
	need(1, "/sbin/init");
}

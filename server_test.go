package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"regexp"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out, seen := &testOutput{}, 0
		log := slog.New(slog.NewTextHandler(out, nil))
		th := throttle{interval: time.Second}
		say := func(times int) {
			for i := range times {
				th.log(log, slog.LevelWarn, "refused", "n", i)
			}
		}
		want := func(want ...string) {
			t.Helper()
			synctest.Wait()
			got := regexp.MustCompile(`n=\d+ count=\d+`).FindAllString(out.String(), -1)[seen:]
			if !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			seen += len(got)
		}
		say(1)
		want("n=0 count=1")
		say(3)
		want()
		time.Sleep(time.Second)
		want()
		say(2)
		want("n=0 count=4")
		time.Sleep(time.Hour)
		say(1)
		want("n=0 count=2")
	})
}

// If the journal breaks while the process stops, the exit code must not be 0.
func TestServeFailsWhileItStops(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	servers, err := openServers(log, newRegistry("test"), []string{"127.0.0.1:0"}, http.NewServeMux())
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	failed := make(chan error, 1)
	stop := func(context.Context) { failed <- errors.New("syncing the journal") }
	if code := serve(ctx, log, servers, func(context.Context) { cancel() }, stop, failed); code != 1 {
		t.Errorf("got exit code %d, want 1", code)
	}
}

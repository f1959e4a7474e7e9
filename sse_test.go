package main

import (
	"slices"
	"strings"
	"testing"
)

func TestAppendEvent(t *testing.T) {
	for _, tt := range []struct {
		name            string
		id, event, data string
		want            string
	}{
		{"everything", "k3v9-17", "task_event", "{}", "event: task_event\ndata: {}\nid: k3v9-17\n\n"},
		{"data alone", "", "", "x", "data: x\n\n"},
		{"no data", "1", "", "", "data: \nid: 1\n\n"},
		{"LF", "", "", "a\nb", "data: a\ndata: b\n\n"},
		{"CR", "", "", "a\rb", "data: a\ndata: b\n\n"},
		{"CRLF is one end", "", "", "a\r\nb", "data: a\ndata: b\n\n"},
		{"LFCR is two", "", "", "a\n\rb", "data: a\ndata: \ndata: b\n\n"},
		{"ends of line alone", "", "", "\n\r\n\r", "data: \ndata: \ndata: \ndata: \n\n"},
		{"a forged field", "", "", "a\nid: 9\n\nretry: 1", "data: a\ndata: id: 9\ndata: \ndata: retry: 1\n\n"},
		{"spaces are kept", " 1 ", " e ", " d ", "event:  e \ndata:  d \nid:  1 \n\n"},
		{"other separators are text", "", "", "a\u2028b\u0085c\vd\x00e", "data: a\u2028b\u0085c\vd\x00e\n\n"},
	} {
		if got := string(appendEvent([]byte("before|"), sentEvent{id: []byte(tt.id), name: []byte(tt.event), data: []byte(tt.data)})); got != "before|"+tt.want {
			t.Errorf("%s: got %q, want %q after what was there", tt.name, got, tt.want)
		}
	}
}

func TestAppendRetryAndComment(t *testing.T) {
	got := string(appendComment(appendRetry(nil, 2500), "no\r\n\ncapacity\rid: 1"))
	if want := "retry: 2500\n: no   capacity id: 1\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	// Some clients take whatever is before a blank line for an event.
	p := parser{lastEventID: "k3v9-17"}
	if messages := p.feed([]byte(heartbeat + got)); messages != nil || p.lastEventID != "k3v9-17" {
		t.Errorf("got messages %q and last event ID %q, want none and the old one", messages, p.lastEventID)
	}
}

// The fields of an event are in the one order that all clients get right; see appendEvent.
func TestEventWithRetry(t *testing.T) {
	e := sentEvent{id: []byte("k3v9-17"), name: []byte("n"), data: []byte("a\nb"), retry: 86_400_000}
	if got, want := string(appendEvent(nil, e)), "retry: 86400000\nevent: n\ndata: a\ndata: b\nid: k3v9-17\n\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestIsOneLine(t *testing.T) {
	for text, want := range map[string]bool{"": true, "k3v9-17": true, "é:\t ": true, "a\nb": false, "a\r": false, "\x00": false} {
		if got := isOneLine([]byte(text)); got != want {
			t.Errorf("%q: got %v, want %v", text, got, want)
		}
	}
}

// Whatever an event holds, a browser reads back that event and nothing else, and is at the start of a line again.
func FuzzAppendEvent(f *testing.F) {
	f.Add("k3v9-17", "task_event", "{\"text\":\"a\"}")
	f.Add("", "", "")
	f.Add(" 1", ":", "a\r\n\nb\r")
	f.Add("\ufeff", "message", "data: x\xff\n\n\x00id: 7")
	f.Fuzz(func(t *testing.T, id, name, data string) {
		if !isOneLine([]byte(id)) || !isOneLine([]byte(name)) {
			t.Skip()
		}
		wire := appendEvent(nil, sentEvent{id: []byte(id), name: []byte(name), data: []byte(data)})
		wire = appendEvent(wire, sentEvent{[]byte("end"), []byte("end"), []byte("end"), true, 0})
		decoded := func(s string) string { return strings.ToValidUTF8(s, "\ufffd") }
		want := []message{
			{decoded(id), decoded(name), decoded(strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(data))},
			{"end", "end", "end"},
		}
		if name == "" {
			want[0].Name = "message"
		}
		if got := new(parser).feed(wire); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q from %q", got, want, wire)
		}
	})
}

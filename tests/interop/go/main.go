// The Go side of the interop tests: containerd's own ttrpc, as Debian packages it.
//
// interop server SOCKET          serves interop.Echo until its stdin ends
// interop client SOCKET          calls each method and prints what came back as JSON
// interop bench SOCKET COUNT     prints the round-trip time of COUNT calls, nanoseconds, one a line
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/gogo/protobuf/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const service = "interop.Echo"

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func echo(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
	var request types.BytesValue
	if err := unmarshal(&request); err != nil {
		return nil, err
	}
	return &request, nil
}

func fail(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
	var request types.StringValue
	if err := unmarshal(&request); err != nil {
		return nil, err
	}
	return nil, status.Error(codes.NotFound, request.Value+": not found")
}

func meta(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
	var request types.StringValue
	if err := unmarshal(&request); err != nil {
		return nil, err
	}
	value, _ := ttrpc.GetMetadataValue(ctx, request.Value)
	return &types.StringValue{Value: value}, nil
}

// wait answers when its deadline has passed, with whether it had one.
func wait(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
	var request types.StringValue
	if err := unmarshal(&request); err != nil {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, status.Error(codes.DeadlineExceeded, "the handler saw its deadline")
	case <-time.After(20 * time.Second):
		return &request, nil
	}
}

func serve(path string) {
	server, err := ttrpc.NewServer(ttrpc.WithServerHandshaker(ttrpc.UnixSocketRequireSameUser()))
	check(err)
	server.Register(service, map[string]ttrpc.Method{"Echo": echo, "Fail": fail, "Meta": meta, "Wait": wait})
	listener, err := net.Listen("unix", path)
	check(err)
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println("listening")
	check(server.Serve(context.Background(), listener))
}

func dial(path string) *ttrpc.Client {
	connection, err := net.Dial("unix", path)
	check(err)
	return ttrpc.NewClient(connection)
}

func call(client *ttrpc.Client) {
	out := map[string]interface{}{}
	ctx := context.Background()
	note := func(name string, err error) {
		s, _ := status.FromError(err)
		out[name] = map[string]interface{}{"code": int(s.Code()), "message": s.Message()}
	}
	big := make([]byte, 3<<20)
	for i := range big {
		big[i] = byte(i * 7)
	}
	var bytes types.BytesValue
	check(client.Call(ctx, service, "Echo", &types.BytesValue{Value: big}, &bytes))
	out["echo"] = string(bytes.Value) == string(big)

	var text types.StringValue
	note("fail", client.Call(ctx, service, "Fail", &types.StringValue{Value: "x"}, &text))
	with := ttrpc.WithMetadata(ctx, ttrpc.MD{"colour": []string{"green"}})
	check(client.Call(with, service, "Meta", &types.StringValue{Value: "colour"}, &text))
	out["meta"] = text.Value
	note("unknown method", client.Call(ctx, service, "Nothing", &types.StringValue{}, &text))
	note("unknown service", client.Call(ctx, "interop.Nobody", "Echo", &types.StringValue{}, &text))
	note("oversize answer", client.Call(ctx, service, "Grow", &types.StringValue{Value: "5000000"}, &bytes))
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	err := client.Call(short, service, "Wait", &types.StringValue{}, &text)
	out["deadline"] = err != nil

	var group sync.WaitGroup
	var lock sync.Mutex
	right := 0
	for i := 0; i < 200; i++ {
		group.Add(1)
		go func(i int) {
			defer group.Done()
			var answer types.BytesValue
			sent := strconv.Itoa(i)
			if err := client.Call(ctx, service, "Echo", &types.BytesValue{Value: []byte(sent)}, &answer); err != nil {
				return
			}
			if string(answer.Value) == sent {
				lock.Lock()
				right++
				lock.Unlock()
			}
		}(i)
	}
	group.Wait()
	out["concurrent"] = right
	check(json.NewEncoder(os.Stdout).Encode(out))
}

func bench(client *ttrpc.Client, count int) {
	request := &types.BytesValue{Value: []byte("0123456789abcdef")}
	var answer types.BytesValue
	for i := 0; i < count; i++ {
		begin := time.Now()
		check(client.Call(context.Background(), service, "Echo", request, &answer))
		fmt.Println(time.Since(begin).Nanoseconds())
	}
}

func main() {
	switch {
	case len(os.Args) == 3 && os.Args[1] == "server":
		serve(os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "client":
		call(dial(os.Args[2]))
	case len(os.Args) == 4 && os.Args[1] == "bench":
		count, err := strconv.Atoi(os.Args[3])
		check(err)
		bench(dial(os.Args[2]), count)
	default:
		fmt.Fprintln(os.Stderr, "usage: interop server|client SOCKET, interop bench SOCKET COUNT")
		os.Exit(2)
	}
}

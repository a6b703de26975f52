//go:build !streams

// ttrpc 1.1: unary calls, with gogo's protobuf.
package main

import (
	"context"

	"github.com/containerd/ttrpc"
	"github.com/gogo/protobuf/types"
)

type (
	BytesValue  = types.BytesValue
	StringValue = types.StringValue
	Int64Value  = types.Int64Value
)

func register(server *ttrpc.Server) { server.Register(service, methods()) }

func callStreams(ctx context.Context, client *ttrpc.Client) {}
